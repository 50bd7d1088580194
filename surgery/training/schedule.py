"""``DecompositionSchedule``: decompose a network in the middle of its training, fuse it back later, and go on where a run was cut off."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from passes import host_for
from passes.errors import SurgeryTypeError, SurgeryValueError, true_or_false
from passes.parity import private_inputs, tensors_in
from passes.running import callers_code, private_copy
from surgery.checkpoint import record_to_data
from surgery.decompose import DEFAULT_STATE, Ranks, decompose, plan
from surgery.draft import check_answerable
from surgery.fitting import usable_batches
from surgery.inspection import usable_model
from surgery.options import Options, runtime_of
from surgery.plan import Plan
from surgery.progress import show_progress
from surgery.ranks.budget import Budget
from surgery.ranks.request import parse_ranks
from surgery.reconstruct import reconstruct
from surgery.record import SurgeryRecord, read_record, whole_record, write_record
from surgery.report import Report, report
from surgery.training.batch_norm import reestimate
from surgery.training.decay import FrobeniusDecay, check_decay, frobenius_decay
from surgery.training.deeper import onto, plan_of
from surgery.training.distributed import done_together, told_by_first
from surgery.training.followers import Followers, followers_of
from surgery.training.optimizer import as_optimizers, as_rules, check_hooks, check_rates
from surgery.training.resuming import FORMAT, VERSION, read_state, rebuild
from surgery.training.settling import Settled, stable_ranks
from surgery.training.shorter_steps import Gains, ShorterSteps, gains_of
from surgery.training.step_time import never_slower
from surgery.training.warm_up import WarmUp

__all__ = ["DecompositionSchedule", "check_callback", "standing"]

DECAYS = ("each", "product")
UNITS = ("epoch", "step")
DEFAULT = Options()

Batches = Any  # what ``calibration=`` of decompose takes, or a function without arguments that gives it


class DecompositionSchedule:
    """Decompose a network in place while it is trained: at given epochs or steps, or by itself when its ranks have settled; and fuse it back later.

    Call ``step`` at the start of every epoch (or of every step: positions are in whatever unit it is called with). It returns a report where it did
    something, else None. Optimizer, schedulers, gradients, a gradient scaler and averaged copies live through it (see ``decompose``). Rebuild
    what was made *around* the model after that: ``torch.compile``, ``DistributedDataParallel``.

        schedule = surgery.DecompositionSchedule(decompose_at=10, ranks="evbmf")
        for epoch in range(epochs):
            schedule.step(epoch, model, optimizer)
            ...

    Args:
        decompose_at: the position; a rising list of them to cut deeper later (chains are then cut again at the ranks that their rule gives, where
            those are lower); or ``Settled(...)``.
        reconstruct_at: the position at which chains are fused back into layers, None for never. From there on nothing is cut any more.
        ranks: as for ``decompose``; a list with one entry a cut where there are several.
        method: as for ``decompose``, and so ``include``, ``exclude``, ``round_to``, ``device`` and ``effective_weights``.
        guard: ``"step"`` (the default with ``example_inputs``, but not under a budget): a cut must be measured faster than its layer in forward and
            backward, and the whole training step with all cuts faster than before, else those that save least are taken back, all of them if need
            be: then a budget is not met. What was asked for by name is cut. Others as for ``decompose``; ``"macs"`` is the default otherwise.
        example_inputs: a batch as in training, in its memory format.
        calibration: batches for factors that fit what the layers see now (see ``decompose``), or a function that gives them, called at each cut.
        batch_norm: batches, likewise, to take the statistics of batch norms anew on after each cut, in the model and in its copies.
        rate: the share of the learning rate at which factors are trained, underneath the schedulers: ``"auto"`` measures, at the cut, at what rate
            they move their product as far as the layer would have gone, and raises it when the rate falls
            (see ``surgery/training/shorter_steps.py``); 1 trains them like layers.
        warm_up: optimizer steps after each cut over which the learning rate rises again, underneath the schedulers.
        balanced: chains whose layers have equal norms and, after a data-aware cut, orthogonal bases (see ``decompose``).
        decay: ``"each"``: ``weight_decay`` acts on each factor; ``"product"``: on the product of each chain, as on the layer before
            (see ``frobenius_decay``).
        state: what becomes of the optimizer's state, as for ``decompose``.
        progress: show on stderr what a cut is at, where that is a terminal.

    Raises:
        SurgeryValueError, SurgeryTypeError: arguments that mean nothing.

    Source: Elhoushi et al. 2019, section 3; Wang et al. 2023 for ``Settled``.
    """

    def __init__(
        self,
        decompose_at: int | Sequence[int] | Settled = 10,
        reconstruct_at: int | None = None,
        ranks: Ranks | Sequence[Any] = "evbmf",
        *,
        method: str = DEFAULT.method,
        include: Any = DEFAULT.include,
        exclude: Any = DEFAULT.exclude,
        guard: str | None = None,
        round_to: int = DEFAULT.round_to,
        device: torch.device | str | None = DEFAULT.device,
        effective_weights: bool = DEFAULT.effective_weights,
        example_inputs: Any = None,
        calibration: Batches = None,
        batch_norm: Batches = None,
        rate: float | str = "auto",
        warm_up: int = 0,
        balanced: bool = True,
        decay: str = "each",
        state: Any = DEFAULT_STATE,
        progress: bool = False,
    ) -> None:
        self.when = decompose_at if isinstance(decompose_at, Settled) else _positions(decompose_at)
        self.reconstruct_at = None if reconstruct_at is None else _position("reconstruct_at", reconstruct_at)
        last = self.when.latest if isinstance(self.when, Settled) else self.when[-1]
        if self.reconstruct_at is not None and last is not None and self.reconstruct_at <= last:
            raise SurgeryValueError(f"reconstruct_at: must come after the last cut at {last}, got {self.reconstruct_at}")
        cuts = 1 if isinstance(self.when, Settled) else len(self.when)
        self.ranks: list[Any] = list(ranks) if isinstance(ranks, list | tuple) else [ranks] * cuts
        if len(self.ranks) != cuts:
            raise SurgeryValueError(f"ranks: a list needs one entry for each of the {cuts} cuts, got {len(self.ranks)}")
        self._requests = [parse_ranks(each) for each in self.ranks]
        self._guard = guard
        guard = guard or ("macs" if example_inputs is None else "step")
        if runtime_of(guard) is not None and example_inputs is None:
            raise SurgeryValueError(f'guard: "{guard}" needs example_inputs: without them there is nothing to time')
        self.options = Options(
            method=method, include=include, exclude=exclude, guard=guard, round_to=round_to, device=device, effective_weights=effective_weights
        )
        for request in self._requests:
            check_answerable(request, method, inputs=example_inputs is not None)
        if decay not in DECAYS:
            raise SurgeryValueError(f"decay: {decay!r} is none of {list(DECAYS)}")
        as_rules(state)
        true_or_false("balanced", balanced)
        for argument, batches in (("calibration", calibration), ("batch_norm", batch_norm)):
            if batches is not None and (isinstance(batches, str) or not (callable(batches) or isinstance(batches, Iterable))):
                raise SurgeryTypeError(f"{argument}: expected batches to iterate over, or a function that gives them, got {type(batches).__name__}")
        self.example_inputs, self.calibration, self.batch_norm = example_inputs, calibration, batch_norm
        self.warm_up, self.balanced, self.decay, self.state = _position("warm_up", warm_up), balanced, decay, state
        self.rate = _rate(rate)
        self.progress = progress
        self.cuts_done = 0
        self.whole_again = False
        self.history: list[dict[str, list[float]]] = []
        self._plan: Plan | None = None
        self._record: SurgeryRecord | None = None
        self._looked_at: int | None = None
        self._warmed_up = 0  # optimizer steps since the last cut that were slowed down
        self._warming: WarmUp | None = None
        self._decaying: FrobeniusDecay | None = None
        self._shortened: ShorterSteps | None = None
        self._gains: Gains = {}  # of the factors, when they were made
        self._highest: dict[str, float] = {}  # learning rate since then, by chain
        self._hooked: tuple[Any, ...] = ()  # the optimizers that rate, warm_up and decay act on
        self._last: tuple[Callable[[], nn.Module | None], int] | None = None  # the network that surgery was done on, and the position then

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}  # a copy has seen no network

    def step(self, position: int, model: nn.Module, optimizer: Any = None, scheduler: Any = None, *, also: Any = None) -> Report | None:
        """Do what is due at this position: nothing, mostly.

        In a distributed run every process calls it with its own, unwrapped model (``model.module``): the first process decides and cuts, the others
        are sent the result. Wrap or compile the model anew whenever a report is returned.

        Args:
            position: epoch or step that is about to begin, from 0.
            model: the one that is trained, changed in place.
            optimizer: the one that trains it, or a list of several. Without one ``rate="auto"`` waits for ``attach``.
            scheduler: of learning rates, or a list of several. Most need nothing, because groups stay; ``ReduceLROnPlateau`` counts anew after
                a cut, since the network is then worse for a while for another reason than its rate.
            also: averaged copies of the model, see ``decompose``.

        Raises:
            SurgeryTypeError: a wrapped, compiled or sharded model, with what to do; something that is no optimizer.
            SurgeryValueError: what ``decompose`` cannot do. Model, optimizer and copies are then as they were.
        """
        position = _position("position", position)
        usable_model(model)
        optimizers, schedulers = as_optimizers(optimizer), _schedulers(scheduler)
        self._check_optimizers(optimizers)
        self._check_network(position, model)
        found = None
        while (work := self._due(position, model)) is not None:
            _check_no_average_inside(model)
            cuts = self.cuts_done
            followers = followers_of(model, optimizer, also, self.state, inplace=True) or Followers(model=model)
            try:
                with show_progress(self.progress):
                    done_together(lambda act=work, f=followers: act(f), self._facts, self._take, followers)  # type: ignore[misc]
            finally:  # also where the statistics of batch norms could not be taken after a cut that is made
                self._unhook()
                self._warmed_up = 0 if self.cuts_done > cuts else self._warmed_up
                self._hook(model, optimizers)
            for each in schedulers:
                if isinstance(each, torch.optim.lr_scheduler.ReduceLROnPlateau):
                    each._reset()
            self._last = weakref.ref(model), position
            found = report(model)
        if found is None and optimizers and list(map(id, optimizers)) != list(map(id, self._hooked)):
            self._unhook()
            self._hook(model, optimizers)
        return found

    @property
    def plan(self) -> Plan | None:
        """Of the chains that were cut so far; None before the first cut."""
        return self._plan

    def state_dict(self) -> dict[str, Any]:
        """Position and plan as plain data: what ``load_state_dict`` needs to go on in a fresh process."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "cuts_done": self.cuts_done,
            "whole_again": self.whole_again,
            "plan": None if self._plan is None else json.loads(self._plan.to_json()),
            "record": None if self._record is None else record_to_data(self._record),
            "history": [dict(look) for look in self.history],
            "looked_at": self._looked_at,
            "warmed_up": self._warmed_up if self._warming is None else self._warming.done,
            "gains": {name: list(each) for name, each in self._gains.items()},
            "highest_rates": dict(self._highest),
        }

    def load_state_dict(self, state: Mapping[str, Any], model: nn.Module, optimizer: Any = None, *, also: Any = None, hooks: bool = True) -> None:
        """Bring a fresh model, its optimizer and its copies to the architecture that they had, then load their own state dicts into them.

            schedule.load_state_dict(saved["schedule"], model, optimizer)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])

        The optimizer may be made after this from ``model.parameters()``, whose order is the same: say ``hooks=False``, and ``attach`` it then.

        Args:
            state: what ``state_dict`` gave.
            model: a fresh instance of the original architecture, in its memory format; changed in place.
            optimizer: the one that will train it, or a list of several.
            also: fresh averaged copies.
            hooks: False where the optimizer does not exist yet; call ``attach`` when it does.

        Raises:
            SurgeryValueError: no such state, or it does not fit the model, which is then as it was; no optimizer for what acts on it.
        """
        usable_model(model)
        facts = read_state(state)
        followers = followers_of(model, optimizer, also, "reset", inplace=True) or Followers(model=model)
        if hooks and facts["plan"] is not None:
            self._check_optimizers(followers.optimizers)
            if not followers.optimizers and self.rate != 1 and not facts["whole_again"]:
                raise SurgeryValueError("optimizer: rate acts on it; give it here, or hooks=False here and the optimizer to attach when it is made")
        self._take(facts, followers)
        self._last = None
        self._unhook()
        self.history, self._looked_at, self._warmed_up = facts["history"], facts["looked_at"], facts["warmed_up"]
        if hooks:
            self._hook(model, followers.optimizers)

    def attach(self, model: nn.Module, optimizer: Any) -> None:
        """Have ``rate``, ``warm_up`` and ``decay`` act on an ``optimizer`` made for ``model`` after ``load_state_dict``. Twice does no harm."""
        optimizers = as_optimizers(optimizer)
        self._check_optimizers(optimizers)
        self._unhook()
        self._hook(model, optimizers)

    def _check_optimizers(self, optimizers: Sequence[Any]) -> None:
        if not optimizers and (self.warm_up or self.decay == "product" or (isinstance(self.rate, float) and self.rate != 1)):
            raise SurgeryValueError("optimizer: rate, warm_up and decay='product' act on it; give the one that trains the model")
        if self.warm_up or self.rate != 1:
            check_hooks(optimizers)
        if self.warm_up:
            check_rates(optimizers, "warm_up")
        if self.decay == "product":
            check_decay(optimizers)

    def _check_network(self, position: int, model: nn.Module) -> None:
        if self._last is not None and self._last[0]() is not model and position <= self._last[1]:
            raise SurgeryValueError(
                f"model: another network than the one that this schedule has done its surgery on, at position {self._last[1]}, now at {position}; "
                "make a new DecompositionSchedule for each network"
            )

    def _due(self, position: int, model: nn.Module) -> Callable[[Followers], None] | None:
        """What is to be done at this position, if anything."""
        if self.whole_again:
            return None
        if self.reconstruct_at is not None and position >= self.reconstruct_at:
            return self._fuse if self.cuts_done else None  # too late for a cut: it would be fused back at once
        if isinstance(self.when, Settled):
            return self._cut if self.cuts_done == 0 and self._settled(self.when, position, model) else None
        return self._cut if self.cuts_done < len(self.when) and position >= self.when[self.cuts_done] else None

    def _settled(self, criterion: Settled, position: int, model: nn.Module) -> bool:
        if self._looked_at != position and position % criterion.every == 0:
            o = self.options
            options = {name: getattr(o, name) for name in ("method", "include", "exclude", "device", "effective_weights")}
            self.history.append(told_by_first(partial(stable_ranks, model, self._requests[0], **options)))
            self._looked_at = position
        return criterion.has(position, self.history)

    def _cut(self, followers: Followers) -> None:
        model = followers.model
        cut_before = any(site.chain is not None for site in host_for(model).sites())
        whole = reconstruct(model) if cut_before else model
        batches, statistics = _batches(model, "calibration", self.calibration), _batches(model, "batch_norm", self.batch_norm)
        taken = [(network, [_as_for(network, model, batch) for batch in statistics]) for network in (model, *followers.copies) if statistics]
        for network, own in taken:  # what cannot be run is said before anything is cut
            reestimate(private_copy(network), own)
        standing, chosen = plan_of(model), self._chosen(model, whole, batches)
        decompose(
            model,
            onto(model, chosen),
            example_inputs=self.example_inputs,
            calibration=batches,
            device=self.options.device,
            effective_weights=self.options.effective_weights,
            balanced=self.balanced,
            optimizer=list(followers.optimizers) or None,
            also=list(followers.copies) or None,
            state=self.state,
            inplace=True,
        )
        if chosen.latency is not None:
            write_record(model, replace(read_record(model) or SurgeryRecord(), latency=chosen.latency))
        self._plan, self._record = plan_of(model), whole_record(model)
        stayed = {name for name, chain in self._plan.items() if standing.get(name) == chain}  # they go on as if there had been no cut
        self._gains = gains_of(model) | {name: gains for name, gains in self._gains.items() if name in stayed}
        self._highest = {name: rate for name, rate in self._highest.items() if name in stayed}
        self.cuts_done += 1
        for network, own in taken:
            reestimate(network, own)

    def _chosen(self, model: nn.Module, whole: nn.Module, batches: Any) -> Plan:
        """What the cut that is due would make of the network as it was without chains."""
        ranks, request, o = self.ranks[self.cuts_done], self._requests[self.cuts_done], self.options
        raced = isinstance(request, Budget) and request.latency is not None
        guard = DEFAULT.guard if self._guard is None and isinstance(request, Budget) and not raced else o.guard
        chosen = plan(
            whole,
            ranks,
            example_inputs=self.example_inputs,
            method=o.method,
            include=o.include,
            exclude=o.exclude,
            guard=guard,
            round_to=o.round_to,
            calibration=batches,
            device=o.device,
            effective_weights=o.effective_weights,
        )
        by_name = isinstance(request, Mapping)
        return never_slower(model, whole, chosen, self.example_inputs) if guard == "step" and not raced and not by_name else chosen

    def _fuse(self, followers: Followers) -> None:
        optimizers, copies = list(followers.optimizers) or None, list(followers.copies) or None
        reconstruct(followers.model, optimizer=optimizers, also=copies, state=self.state, inplace=True)
        self.whole_again = True
        self._record = whole_record(followers.model)

    def _facts(self) -> dict[str, Any]:
        facts = {"cuts_done": self.cuts_done, "whole_again": self.whole_again, "gains": self._gains, "highest_rates": self._highest}
        return {**facts, "plan": self._plan, "record": self._record}

    def _take(self, facts: Mapping[str, Any], followers: Followers) -> None:
        """Bring model, optimizers and copies to the architecture of these facts; the numbers come from elsewhere."""
        if facts["plan"] is not None:
            rebuild(followers, facts["plan"], whole_again=facts["whole_again"])
            if facts["record"] is not None:
                for network in (followers.model, *followers.copies):
                    write_record(network, facts["record"])
        self.cuts_done, self.whole_again = facts["cuts_done"], facts["whole_again"]
        self._gains, self._highest = facts["gains"], dict(facts["highest_rates"])
        self._plan, self._record = facts["plan"], facts["record"]

    def _unhook(self) -> None:
        self._hooked = ()
        if self._warming is not None:
            self._warming.remove()
            self._warmed_up, self._warming = self._warming.done, None
        if self._decaying is not None:
            self._decaying.remove()
            self._decaying = None
        if self._shortened is not None:
            self._shortened.remove()
            self._shortened = None

    def _hook(self, model: nn.Module, optimizers: Sequence[Any]) -> None:
        """Learning rates and decay from here on."""
        self._hooked = tuple(optimizers)
        cut = self.cuts_done > 0 and not self.whole_again
        self._warming = WarmUp(list(optimizers), self.warm_up, self._warmed_up) if cut and self.warm_up else None
        # torch calls hooks in this order: what decay does to the factors after a step is shortened with it
        self._decaying = frobenius_decay(model, list(optimizers)) if cut and self.decay == "product" else None
        self._shortened = ShorterSteps(model, list(optimizers), self.rate, self._gains, self._highest) if cut and self.rate != 1 else None


def check_callback(schedule: Any, unit: Any) -> None:
    """Refuse what a callback of a trainer cannot be made of."""
    if not isinstance(schedule, DecompositionSchedule):
        raise SurgeryTypeError(f"schedule: expected a DecompositionSchedule, got {type(schedule).__name__}")
    if unit not in UNITS:
        raise SurgeryValueError(f"unit: {unit!r} is none of {list(UNITS)}")


def standing(schedule: DecompositionSchedule) -> dict[str, Any]:
    """The chains that a schedule has made and not fused back: checkpoints with others hold another architecture."""
    return {} if schedule.plan is None or schedule.whole_again else dict(schedule.plan)


def _as_for(network: nn.Module, model: nn.Module, batch: Any) -> Any:
    """A batch of the model's for a copy of it, which may lie elsewhere or be held in more digits."""
    mine, own = (next((t for t in (*net.parameters(), *net.buffers()) if t.is_floating_point()), None) for net in (model, network))
    if mine is None or own is None or (mine.device, mine.dtype) == (own.device, own.dtype):
        return batch
    moved = {id(t): t.detach().to(own.device, own.dtype if t.dtype == mine.dtype else t.dtype) for t in tensors_in(batch)}
    return private_inputs(batch, moved)


def _batches(model: nn.Module, argument: str, given: Batches) -> Any:
    """The batches of an argument, asked for now where it is a function."""
    if given is None:
        return None
    if callable(given):
        with callers_code(f"{argument}: the function that gives its batches failed"):
            given = given()
    return usable_batches(model, given, argument=argument)


def _position(name: str, value: Any) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise SurgeryTypeError(f"{name}: expected an int, got {value!r}")
    if value < 0:
        raise SurgeryValueError(f"{name}: must be at least 0, got {value}")
    return int(value)


def _rate(value: Any) -> float | str:
    if value == "auto":
        return "auto"
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise SurgeryTypeError(f"rate: expected 'auto' or a number, got {value!r}")
    if not 0 < value <= 1:
        raise SurgeryValueError(f"rate: expected a share in (0, 1], got {value}")
    return float(value)


def _positions(value: Any) -> tuple[int, ...]:
    several = tuple(_position("decompose_at", v) for v in (value if isinstance(value, list | tuple) else [value]))
    if not several or list(several) != sorted(set(several)):
        raise SurgeryValueError(f"decompose_at: expected a position or a rising list of them, got {value!r}")
    return several


def _check_no_average_inside(model: nn.Module) -> None:
    inside = next((name for name, module in model.named_modules() if name and isinstance(module, AveragedModel)), None)
    if inside is not None:
        raise SurgeryValueError(
            f"model: {inside!r} in it is an averaged copy of a part, which would be cut on bases of its own and could not be averaged any more; "
            "give the part itself (part= of callbacks) and the copy as also="
        )


def _schedulers(scheduler: Any) -> list[Any]:
    """Those given, and those that they hold."""
    several = [] if scheduler is None else list(scheduler) if isinstance(scheduler, list | tuple) else [scheduler]
    for each in several:
        if not callable(getattr(each, "step", None)) or isinstance(each, torch.optim.Optimizer):
            raise SurgeryTypeError(f"scheduler: expected a scheduler of learning rates, or a list of them, got {type(each).__name__}")
    for each in several:  # which grows
        inner = [getattr(each, "scheduler", None), *getattr(each, "_schedulers", ())]  # of accelerate; SequentialLR, ChainedScheduler
        several += [one for one in inner if one is not None and not any(one is known for known in several)]
    return several
