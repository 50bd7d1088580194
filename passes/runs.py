"""What all passes that fuse have in common: runs of linear modules, fused pair by pair as far as a rule allows, and what is said of each module.

A linear module is a convolution, a linear layer, or a batch norm in eval mode. A run is a sequence of them, each the only reader of the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from passes.chain import in_format_of, plain_layer, twin_of
from passes.fusion import batch_norm_piece, fuse, refuses
from passes.geometry import Geometry, Piece, PieceShape
from passes.host import Host
from passes.neighbours import BATCH_NORMS, Neighbour, is_norm
from passes.placing import known_calls
from passes.result import Outcome, PassResult
from passes.site import is_layer

__all__ = ["Part", "fuse_runs"]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One or more modules of a run, first to last, as one piece."""

    members: tuple[Neighbour, ...]
    piece: Piece

    @property
    def layers(self) -> tuple[Neighbour, ...]:
        """Its members that are not batch norms."""
        return tuple(m for m in self.members if is_layer(m.module))

    def macs(self, geometry: Geometry | None = None) -> int | None:
        """MACs of all its calls, or those of a layer of another geometry in its place; None where the calls are not known."""
        calls = known_calls(self.members)
        if geometry is None and not self.layers:
            return 0  # a batch norm multiplies no matrices
        return None if calls is None else sum((geometry or self.piece.geometry).macs(c.input_shape) for c in calls)


def fuse_runs(
    host: Host,
    *,
    wanted: Callable[[Neighbour], bool],
    rule: Callable[[Part, Part], str | None],
    subject: Callable[[Neighbour], bool],
    backward: bool = False,
) -> PassResult:
    """Fuse all neighbouring linear modules that a rule allows; the layer takes the place of the largest of them, outside a chain if there is one.

    Args:
        host: the model.
        wanted: which linear modules the pass looks at.
        rule: why two parts, one right after the other, are not to be fused, or None; asked before whether they can be.
        subject: of which modules it is said why they were kept.
        backward: whether a module that has nothing to be fused with is told about the one before it rather than the one after it.
    """
    neighbours = host.neighbours()
    parts: dict[str, Part] = {}
    reasons: dict[str, str] = {}
    for name, member in neighbours.items():
        alone = member.reader is None and member.source is None
        if (is_layer(member.module) or is_norm(member.module)) and wanted(member) and not alone:
            part = member.keep or _part_of(member)
            if isinstance(part, str):
                reasons[name] = part
            else:
                parts[name] = part
    outcomes: dict[str, Outcome] = {}
    for run in _runs(parts):
        fused, after, before = _fused(run, rule)
        reasons |= before if backward else before | after
        for part in fused:
            if len(part.members) > 1:
                outcomes |= _put(host, part)
    kept = [n for n, member in neighbours.items() if subject(member) and n not in outcomes]
    outcomes |= {n: Outcome(n, "kept", reasons.get(n) or neighbours[n].keep or _alone(neighbours[n], neighbours, reasons, backward)) for n in kept}
    model = host.commit()
    order = {name: index for index, name in enumerate(neighbours)}
    told = sorted(outcomes.values(), key=lambda o: order.get(o.site, len(order)))
    return PassResult(model, any(o.status == "applied" for o in told), tuple(told))


def _part_of(member: Neighbour) -> Part | str:
    """A linear module as a piece, or why it cannot be one."""
    module: Any = member.module
    tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    if any(t.is_meta for t in tensors):
        return "it is on the meta device and has no numbers"
    if is_layer(module):
        piece = Piece(member.name, Geometry.of(module), module.weight.detach(), None if module.bias is None else module.bias.detach())
        return Part((member,), piece)
    if module.running_mean is None or module.running_var is None:
        return "it has no running statistics, so that it depends on the whole batch"
    if module.training:
        return "it is in train mode, where it depends on the whole batch; call eval() first"
    dims = BATCH_NORMS[type(module)]
    if dims is None:
        if member.calls is None:
            return "of how many dimensions its input is, and so which of them it scales, is not known without example_inputs"
        ranks = {len(call.input_shape) for call in member.calls}
        if len(ranks) != 1:
            return "it is called on inputs of different numbers of dimensions" if ranks else "the example inputs do not reach it"
        dims = max(ranks.pop() - 2, 0)
    weight, bias = (None if t is None else t.detach() for t in (module.weight, module.bias))
    piece = batch_norm_piece(dims, module.running_mean, module.running_var, weight, bias, module.eps)
    if not all(bool(t.isfinite().all()) for t in (piece.weight, piece.bias) if t is not None):
        return "its running statistics give a scale or shift that is not finite"
    return Part((member,), piece)


def _runs(parts: Mapping[str, Part]) -> list[list[Part]]:
    """Maximal sequences in which each part is the only reader of the one before."""
    runs = []
    for name, part in parts.items():
        if part.members[0].source in parts:
            continue
        run, following = [part], part.members[0].reader
        while following is not None and following in parts and following != name:
            run.append(parts[following])
            following = parts[following].members[0].reader
        runs.append(run)
    return runs


def _fused(run: Sequence[Part], rule: Callable[[Part, Part], str | None]) -> tuple[list[Part], dict[str, str], dict[str, str]]:
    """A run fused until no two neighbours can be any more; why not, for the module before and for the module after each border that is left."""
    parts, after, before = list(run), dict[str, str](), dict[str, str]()
    index = 0
    while index + 1 < len(parts):
        left, right = parts[index], parts[index + 1]
        reason = _strangers(left, right) or rule(left, right) or refuses(left.piece, right.piece)
        if reason is None:
            whole, dtype = fuse(left.piece, right.piece), _dtypes(left, right).pop()
            if not all(bool(t.to(dtype).isfinite().all()) for t in (whole.weight, whole.bias) if t is not None):
                reason = f"the numbers of the fused layer overflow {dtype}"
            else:
                parts[index : index + 2] = [Part(left.members + right.members, whole)]
                index = max(index - 1, 0)  # the one before may now fit
                continue
        after[left.members[-1].name] = f"with {right.members[0].name} after it: {reason}"
        before[right.members[0].name] = f"with {left.members[-1].name} before it: {reason}"
        index += 1
    return parts, after, before


def _strangers(left: Part, right: Part) -> str | None:
    dtypes = _dtypes(left, right)
    if not dtypes:
        return "neither is a layer"
    if len(dtypes) > 1 or left.piece.weight.device != right.piece.weight.device:
        return "they differ in dtype or device"
    if _home(left.members + right.members) is None:
        return "something else runs in between, before the first layer"
    return None


def _dtypes(left: Part, right: Part) -> set[torch.dtype]:
    return {m.module.weight.dtype for m in left.layers + right.layers}  # type: ignore[misc]


def _home(members: Sequence[Neighbour]) -> Neighbour | None:
    """The layer whose place the fused one takes: outside a chain before inside, then the largest; None where there is none to take.

    Inside a module the input is handed to that place unchanged, so nothing that could work in place on it may run before.
    """
    layers, waiting = list[Neighbour](), False
    for member in members:
        if is_layer(member.module) and not waiting:
            layers.append(member)
        waiting = waiting or not member.at_once
    return max(layers, key=lambda m: (m.chain is None, m.module.weight.numel()), default=None)  # type: ignore[operator,union-attr]


def _put(host: Host, part: Part) -> dict[str, Outcome]:
    names = [m.name for m in part.members]
    home = _home(part.members) or part.layers[0]
    effects = host.fuse(names, home.name, _layer(part, home.module))
    parameters = {id(p): p.numel() for m in part.members for p in m.module._parameters.values() if p is not None}
    apart = [Part((m,), Piece("", Geometry.of(m.module), m.module.weight, None)).macs() for m in part.layers]  # type: ignore[arg-type]
    outcomes = {name: Outcome(name, "applied", f"fused into {home.name}: {effect}" if name in names else effect) for name, effect in effects.items()}
    outcomes[home.name] = Outcome(
        home.name,
        "applied",
        f"stands for {', '.join(names)}",
        params_before=sum(parameters.values()),
        params_after=PieceShape("", part.piece.geometry, part.piece.bias is not None).params,
        macs_before=None if None in apart else sum(n for n in apart if n is not None),
        macs_after=part.macs(),
    )
    return outcomes


def _layer(part: Part, home: nn.Module) -> nn.Module:
    """The fused layer: of the home's own class where it has the home's geometry, else a plain one; dtype, device and format are the home's."""
    g, like = part.piece.geometry, home.weight
    trainable = any(p.requires_grad for m in part.layers for p in m.module.parameters())
    with torch.no_grad():
        weight, bias = (None if t is None else t.to(device=like.device, dtype=like.dtype) for t in (part.piece.weight, part.piece.bias))  # type: ignore[arg-type,union-attr]
        piece = Piece("", g, nn.Parameter(in_format_of(weight, like), requires_grad=trainable), None)  # type: ignore[arg-type]
        layer = plain_layer(piece, None if bias is None else nn.Parameter(bias.clone(), requires_grad=trainable))
    if g == Geometry.of(home):
        parameters, layer = layer._parameters, twin_of(home)
        layer.__dict__["_parameters"] = parameters
    layer.train(home.training)
    return layer


def _alone(member: Neighbour, neighbours: Mapping[str, Neighbour], reasons: Mapping[str, str], backward: bool) -> str:
    """Why a module that nothing else keeps had nothing to be fused with."""
    other = member.source if backward else member.reader
    if other is None:
        return (member.no_source if backward else member.no_reader) or "nothing stands next to it"
    where = f"{other} ({type(neighbours[other].module).__name__}) stands {'before' if backward else 'after'} it"
    return f"{where} and must stay: {reasons[other]}" if other in reasons else where
