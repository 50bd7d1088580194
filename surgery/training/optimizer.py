"""What becomes of an optimizer when parameters of its model are replaced by others.

Groups change in place, so that their options, their number, ``initial_lr`` and every scheduler hold: new parameters take the slot of those that
they replace. What the optimizer knows of the old ones becomes, key by key, what it would know of the new ones.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from passes.errors import SurgeryTypeError, SurgeryValueError
from surgery.training.chain_map import ChainMap
from surgery.undoing import Undo

__all__ = ["RULES", "STATE", "OptimizerChange", "Swap", "as_optimizers", "as_rules", "check_hooks", "check_rates", "gradient_under", "prepare"]

STATE = ("project", "reset")
RULES: Mapping[str, str] = {
    "momentum_buffer": "gradient",  # SGD, Muon; RMSprop's is a sum of steps, see _steps_under
    "exp_avg": "gradient",  # Adam and its kin, Lion, LAMB
    "grad_avg": "gradient",  # RMSprop, centred
    "exp_avg_diff": "gradient",  # Adan
    "neg_pre_grad": "gradient",
    "exp_avg_sq": "square",
    "max_exp_avg_sq": "square",  # AMSGrad
    "square_avg": "square",  # RMSprop, Adadelta
    "sum": "square",  # Adagrad
    "exp_inf": "magnitude",  # Adamax
    "ax": "weight",  # ASGD: an average of the parameter itself
    "acc_delta": "zero",  # Adadelta: squares of past steps
}
"""What each key of an optimizer's state is: ``"gradient"`` (an average of gradients), ``"square"`` (of their squares), ``"magnitude"`` (their size),
``"weight"`` (an average of the parameter), ``"zero"`` (begun again). Numbers, such as the count of steps, are taken over as they are."""
AVERAGE = "exp_avg"
"""The average of the gradients whose squares are beside it."""
MEANINGS = ("gradient", "square", "magnitude", "weight", "zero")
SHARDED = ("ZeroRedundancyOptimizer",)
INSIDE = (
    "optimizer",
    "base_optimizer",
    "_base_optimizer",
)  # where wrappers have the optimizer that they wrap (accelerate, Lightning; SAM, Lookahead)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Swap:
    """Parameters of one layer or chain, and those that stand in their place.

    Attributes:
        name: of the site.
        old: a layer's weight, or a chain's factors, or whatever a weight was computed from.
        new: likewise.
        old_names: their names below the site: ``"weight"``, ``"core.weight"``.
        new_names: likewise.
        before: the map of the old factors; None where ``old`` is one weight.
        after: the map of the new factors; None where ``new`` is one weight.
        computed: the old weight was computed from ``old``, nobody knows how.
        renamed: old and new names of parameters that stay, by identity.
    """

    name: str
    old: tuple[nn.Parameter, ...]
    new: tuple[nn.Parameter, ...]
    old_names: tuple[str, ...]
    new_names: tuple[str, ...]
    before: ChainMap | None
    after: ChainMap | None
    computed: bool = False
    renamed: Mapping[int, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class OptimizerChange:
    """Everything that an optimizer gets, worked out; ``commit`` assigns it, and ``undo`` can take it back."""

    optimizer: Any
    groups: list[dict[str, list[Any]]]
    gone: list[nn.Parameter]
    states: dict[nn.Parameter, dict[str, Any]]

    def commit(self, undo: Undo) -> None:
        before = [{key: list(group[key]) for key in lists} for group, lists in zip(self.optimizer.param_groups, self.groups, strict=True)]
        states = dict(self.optimizer.state)
        undo.later(lambda: self._put_back(before, states))
        self._set_groups(self.groups)
        for parameter in self.gone:
            self.optimizer.state.pop(parameter, None)
        for parameter, state in self.states.items():
            self.optimizer.state[parameter] = state

    def _set_groups(self, groups: Sequence[Mapping[str, list[Any]]]) -> None:
        for group, lists in zip(self.optimizer.param_groups, groups, strict=True):
            for key, values in lists.items():
                group[key][:] = values

    def _put_back(self, groups: Sequence[Mapping[str, list[Any]]], states: Mapping[nn.Parameter, Any]) -> None:
        self._set_groups(groups)
        self.optimizer.state.clear()  # the same mapping: it may be held elsewhere
        self.optimizer.state.update(states)


def as_optimizers(optimizer: Any) -> tuple[Any, ...]:
    """One optimizer or several, none twice, without the wrappers of training frameworks.

    Raises:
        SurgeryTypeError: something that is none, or one whose state cannot be carried over.
    """
    if optimizer is None:
        return ()
    several = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
    several = [_bare(each) for each in several]
    for each in several:
        if not isinstance(getattr(each, "param_groups", None), list) or not isinstance(getattr(each, "state", None), Mapping):
            raise SurgeryTypeError(f"optimizer: expected a torch optimizer, or a list of them, got {type(each).__name__}")
        if isinstance(each, torch.optim.LBFGS):
            raise SurgeryTypeError("optimizer: LBFGS keeps one history of all parameters together; decompose without it and make it anew afterwards")
        if type(each).__name__ in SHARDED:
            raise SurgeryTypeError(
                f"optimizer: {type(each).__name__} holds a part of the state only; decompose without it and make it anew afterwards"
            )
    return tuple({id(each): each for each in several}.values())


def check_hooks(optimizers: Sequence[Any]) -> None:
    """Refuse what does not call hooks before and after its steps, as ``torch.optim.Optimizer`` has it.

    Raises:
        SurgeryTypeError: one of them does not.
    """
    for each in optimizers:
        try:
            each.register_step_pre_hook(lambda *_: None).remove()
        except AttributeError as error:
            raise SurgeryTypeError(
                f"optimizer: {type(each).__name__} calls no hooks, through which rate, warm_up and decay act; "
                "derive it from torch.optim.Optimizer, or say rate=1, warm_up=0 and decay='each'"
            ) from error


def check_rates(optimizers: Sequence[Any], what: str) -> None:
    """Refuse optimizers that find their rates by themselves.

    Raises:
        SurgeryValueError: the ``lr`` of a group is None.
    """
    for each in optimizers:
        if any(group.get("lr") is None for group in each.param_groups):
            raise SurgeryValueError(
                f"{what}: {type(each).__name__} has no learning rate in its groups that it could act on; give it one, or no {what}"
            )


def _bare(optimizer: Any) -> Any:
    """The optimizer itself, which makes the steps and has the state."""
    while inner := next((o for name in INSIDE if isinstance(o := getattr(optimizer, name, None), torch.optim.Optimizer)), None):
        optimizer = inner
    return optimizer


def as_rules(state: Any) -> Mapping[str, str] | None:
    """What the keys of the state mean under ``state=``; None where all of it is begun again.

    Raises:
        SurgeryValueError, SurgeryTypeError: it means nothing.
    """
    if isinstance(state, Mapping):
        for key, meaning in state.items():
            if meaning not in MEANINGS:
                raise SurgeryValueError(f"state: {key!r} must be one of {list(MEANINGS)}, got {meaning!r}")
        return {**RULES, **state}
    if state not in STATE:
        kind = SurgeryValueError if isinstance(state, str) else SurgeryTypeError
        raise kind(f"state: expected one of {list(STATE)}, or a dict from keys of the optimizer's state to what they are, got {state!r}")
    return RULES if state == "project" else None


def prepare(optimizer: Any, swaps: Sequence[Swap], rules: Mapping[str, str] | None) -> OptimizerChange:
    """What the swaps mean for one optimizer. Nothing is changed yet.

    A key of the state that has the parameter's shape and no rule, or another shape than a number's, cannot be carried over: the parameters are then
    without state, as new ones are, and a warning says so.

    Args:
        optimizer: one with ``param_groups`` and ``state``.
        swaps: those that it does not hold are passed over.
        rules: see ``as_rules``.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    mine = [swap for swap in swaps if any(id(p) in held for p in swap.old)]
    places = {id(next(p for p in swap.old if id(p) in held)): swap for swap in mine}
    gone = {id(p): p for swap in mine for p in swap.old}
    renamed = {key: names for swap in mine for key, names in swap.renamed.items()}
    groups = [_regrouped(group, places, gone, renamed) for group in optimizer.param_groups]
    states: dict[nn.Parameter, dict[str, Any]] = {}
    lost: dict[str, int] = {}
    for swap in mine if rules is not None else ():
        found = [optimizer.state.get(p, {}) for p in swap.old]
        if not any(found):
            continue
        new = _carried(swap, found, rules or {})
        if isinstance(new, str):
            lost[new] = lost.get(new, 0) + 1
        else:
            states |= dict(zip(swap.new, new, strict=True))
    if any(group.get("fused") and group.get("momentum") for group in optimizer.param_groups):
        states |= _momenta(groups, {**optimizer.state, **states}, [p for swap in mine for p in swap.new if p not in states])
    for why, count in lost.items():
        warnings.warn(f"optimizer: the {type(optimizer).__name__} state of {count} layers is begun again: {why}", stacklevel=2)
    return OptimizerChange(optimizer, groups, list(gone.values()), states)


def _momenta(
    groups: Sequence[Mapping[str, Any]], states: Mapping[Any, Mapping[str, Any]], bare: Sequence[nn.Parameter]
) -> dict[nn.Parameter, dict[str, Any]]:
    """For new parameters without state a momentum of zero, where others of their group have one: torch's fused SGD wants all or none."""
    begun = {id(p) for p in bare}
    found: dict[nn.Parameter, dict[str, Any]] = {}
    for group in groups:
        others = [p for p in group["params"] if id(p) not in begun]
        if any(states.get(p, {}).get("momentum_buffer") is not None for p in others):
            found |= {p: {"momentum_buffer": torch.zeros_like(p, requires_grad=False)} for p in group["params"] if id(p) in begun}
    return found


def gradient_under(swap: Swap, gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """An average of gradients of the old parameters as that of the new ones, float64."""
    return _pulled(swap, _weight_gradient(swap, gradients))


def _pulled(swap: Swap, slope: Tensor) -> tuple[Tensor, ...]:
    """The gradient of the layer's weight as that of the new parameters."""
    return (slope,) if swap.after is None else swap.after.pull_back(slope)


def _weight_gradient(swap: Swap, gradients: Sequence[Tensor]) -> Tensor:
    """An average of gradients of the old parameters as that of the layer's weight, float64."""
    return gradients[0].double() if swap.before is None else swap.before.least_norm([g.double() for g in gradients])


def _square_under(swap: Swap, squares: Sequence[Tensor], slope: Tensor | None = None) -> tuple[Tensor, ...]:
    """Squares of gradients; with an average of the weight's gradients, where one is known, which tells how their entries add up."""
    squares = [s.double() for s in squares]
    weight = squares[0]
    if swap.before is not None:
        if slope is not None:
            squares = [s / c for s, c in zip(squares, swap.before.correlation(slope), strict=True)]
        weight = swap.before.squares_of(squares)
    if swap.after is None:
        return (weight,)
    found = swap.after.pull_back_squares(weight)
    return found if slope is None else tuple(f * c for f, c in zip(found, swap.after.correlation(slope), strict=True))


def _weight_under(swap: Swap, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    weight = weights[0].double() if swap.before is None else swap.before.weight(*(w.double() for w in weights))
    return (weight,) if swap.after is None else swap.after.projected(weight)


def _magnitude_under(swap: Swap, sizes: Sequence[Tensor], slope: Tensor | None = None) -> tuple[Tensor, ...]:
    return tuple(s.clamp(min=0).sqrt() for s in _square_under(swap, [s.double().square() for s in sizes], slope))


def _zeros_under(swap: Swap, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(p.shape, dtype=torch.float64, device=p.device) for p in swap.new)


UNDER: Mapping[str, Callable[..., tuple[Tensor, ...]]] = {
    "gradient": gradient_under,
    "square": _square_under,
    "magnitude": _magnitude_under,
    "weight": _weight_under,
    "zero": _zeros_under,
}


def _carried(swap: Swap, states: Sequence[Mapping[str, Any]], rules: Mapping[str, str]) -> list[dict[str, Any]] | str:
    """The state of each new parameter, or why there is none."""
    if swap.computed:
        return "their weight was computed from other parameters, and how gradients went there is not known"
    if not all(states) or len({tuple(state) for state in states}) > 1:
        return "this optimizer knows some of a chain's factors only"
    average = functools.cache(lambda: _weight_gradient(swap, [state[AVERAGE] for state in states]))  # several keys need it: solve for it once
    new: list[dict[str, Any]] = [{} for _ in swap.new]
    for key in states[0]:
        values = [state[key] for state in states]
        if all(isinstance(v, Tensor) and v.shape == p.shape and v.ndim > 0 for v, p in zip(values, swap.old, strict=True)):
            if key not in rules:
                return f'what {key!r} is of a parameter is not known; say it with state={{{key!r}: "gradient"}}, or one of {list(MEANINGS[1:])}'
            found = _under(swap, key, states, rules, average)
            for state, parameter, value in zip(new, swap.new, found, strict=True):
                state[key] = torch.empty_like(parameter, dtype=values[0].dtype, requires_grad=False).copy_(value)
        elif all(v is None or isinstance(v, int | float) or (isinstance(v, Tensor) and v.ndim == 0) for v in values):
            for state in new:
                state[key] = copy.deepcopy(values[0])
        else:
            return f"{key!r} does not have the shape of its parameter"
    return new


def _under(swap: Swap, key: str, states: Sequence[Mapping[str, Any]], rules: Mapping[str, str], average: Callable[[], Tensor]) -> tuple[Tensor, ...]:
    """One key of the state for the new parameters; RMSprop's keys hang together, and Adam's (``average``: the weight's gradient)."""
    if key == "momentum_buffer" and "square_avg" in states[0]:
        return _steps_under(swap, states)
    if key == "square_avg" and "grad_avg" in states[0]:
        return _centred_squares_under(swap, states)
    values = [state[key] for state in states]
    averaged = rules.get(AVERAGE) == "gradient" and all(AVERAGE in state for state in states)
    if averaged and key == AVERAGE:
        return _pulled(swap, average())
    if averaged and rules[key] in ("square", "magnitude"):
        return UNDER[rules[key]](swap, values, average())
    return UNDER[rules[key]](swap, values)


def _centred_squares_under(swap: Swap, states: Sequence[Mapping[str, Any]]) -> tuple[Tensor, ...]:
    """Squares beside the average g of the same gradients: variances v - g^2 as squares, g as a gradient, so that no variance is negative."""
    averages = [state["grad_avg"].double() for state in states]
    variances = [(state["square_avg"].double() - g.square()).clamp(min=0) for state, g in zip(states, averages, strict=True)]
    return tuple(v + g.square() for v, g in zip(_square_under(swap, variances), gradient_under(swap, averages), strict=True))


def _steps_under(swap: Swap, states: Sequence[Mapping[str, Any]]) -> tuple[Tensor, ...]:
    """A sum of gradients over their deviations (RMSprop's momentum): those of the weight are taken out, those of the factors put in."""

    def deviations(squares: Sequence[Tensor], averages: Sequence[Tensor] | None) -> list[Tensor]:
        taken = [torch.zeros_like(s) for s in squares] if averages is None else [g.square() for g in averages]
        return [(s - t).clamp(min=0).sqrt() for s, t in zip(squares, taken, strict=True)]

    squares = [state["square_avg"].double() for state in states]
    centred = "grad_avg" in states[0]
    averages = [state["grad_avg"].double() for state in states] if centred else None
    gradients = gradient_under(swap, [state["momentum_buffer"].double() * d for state, d in zip(states, deviations(squares, averages), strict=True)])
    after = deviations(
        _centred_squares_under(swap, states) if centred else _square_under(swap, squares),
        None if averages is None else gradient_under(swap, averages),
    )
    return tuple(torch.where(d > 0, g / d.clamp(min=torch.finfo(d.dtype).tiny), 0.0) for g, d in zip(gradients, after, strict=True))


def _regrouped(
    group: Mapping[str, Any], places: Mapping[int, Swap], gone: Mapping[int, nn.Parameter], renamed: Mapping[int, tuple[str, str]]
) -> dict[str, list[Any]]:
    """The group's lists that go parameter by parameter, with new parameters in the slots of old ones."""
    named = isinstance(group.get("param_names"), list)
    names = group["param_names"] if named else [""] * len(group["params"])
    parameters: list[Any] = []
    new_names: list[str] = []
    early = _before_their_biases(group["params"], places)
    for parameter, name in zip(group["params"], names, strict=True):
        for swap in early.get(id(parameter), ()):
            owns = {id(p): own for p, own in zip(swap.old, swap.old_names, strict=True)} | {key: old for key, (old, _) in swap.renamed.items()}
            parameters += swap.new
            new_names += [name.removesuffix(owns[id(parameter)]) + new for new in swap.new_names]
        if id(parameter) not in gone:
            parameters.append(parameter)
            old, new = renamed.get(id(parameter), ("", ""))
            new_names.append(name.removesuffix(old) + new)
    return {"params": parameters} | ({"param_names": new_names} if named else {})


def _before_their_biases(parameters: Sequence[nn.Parameter], places: Mapping[int, Swap]) -> dict[int, list[Swap]]:
    """The parameters of a group that new ones come before: the first of a layer that they replace, or its bias where that is earlier.

    So the group stays in the order of ``model.parameters()``, where a layer with a computed weight has its bias first, and a chain last.
    """
    found: dict[int, list[Swap]] = {}
    for swap in (places[id(p)] for p in parameters if id(p) in places):
        of_layer = {id(p) for p in swap.old} | set(swap.renamed)
        found.setdefault(next(id(p) for p in parameters if id(p) in of_layer), []).append(swap)
    return found
