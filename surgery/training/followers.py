"""Who lives through surgery in place: optimizers, gradients, and averaged copies of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from passes import Host, Reconstruct, host_for
from passes.decompose import refusal_of
from passes.errors import SurgeryTypeError, SurgeryValueError
from passes.factorization import Factorization
from passes.geometry import Geometry, Piece
from passes.host import tied_pieces
from passes.site import Site, computes_weight
from surgery.record import put_back_record, read_record, unwrap
from surgery.training.chain_map import ChainMap
from surgery.training.optimizer import Swap, as_optimizers, as_rules, gradient_under, prepare
from surgery.undoing import Undo

__all__ = ["Followers", "followers_of"]


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """Parameters of one site as they are now, with their names below the site; ``factorization`` where they are a chain's."""

    site: Site
    parameters: tuple[nn.Parameter, ...]
    names: tuple[str, ...]
    pieces: tuple[Piece, ...] = ()
    computed: bool = False
    bias: tuple[nn.Parameter, str] | None = None  # it stays the same parameter, under another name

    def chain_map(self) -> ChainMap | None:
        return None if self.site.chain is None else ChainMap.of(self.site.geometry, self.site.chain, self.pieces)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Followers:
    """What follows one model.

    Attributes:
        model: it.
        optimizers: those that hold its parameters.
        copies: averaged copies of it, of the same class.
        rules: what the keys of the optimizers' states mean; None where they are begun again.
        gradients: those that were accumulated already follow as well.
    """

    model: nn.Module
    optimizers: tuple[Any, ...] = ()
    copies: tuple[nn.Module, ...] = ()
    rules: Mapping[str, str] | None = None
    gradients: bool = True

    def hold(self, sites: Sequence[Site]) -> dict[str, _Held]:
        """What the sites hold before the surgery."""
        return {site.name: _held(self.model, site) for site in sites if site.tied_to is None}

    def follow(self, before: Mapping[str, _Held], sites: Sequence[Site], undo: Undo) -> None:
        """Do to all what was done to the model between the call of ``hold`` and now. What takes it back is added to ``undo``.

        Copies are cut on the bases of the model's chains (``ChainMap.projected``) and fused back as the model is.

        Raises:
            SurgeryValueError: a copy's layers are not those that the model's were.
        """
        swaps = self._swaps(before, sites)
        gradients = [found for swap in swaps for found in _gradients(swap)] if self.gradients else []
        changes = [prepare(optimizer, swaps, self.rules) for optimizer in self.optimizers]
        for index, twin in enumerate(self.copies):
            host = host_for(twin, effective_weights=True)
            undo.later(partial(put_back_record, twin, read_record(twin)))
            undo.later(host.rollback)
            _follow_in_copy(host, sites, {swap.name: swap for swap in swaps}, f"also[{index}]")
            put_back_record(twin, read_record(self.model))
        for change in changes:
            change.commit(undo)
        for parameter, gradient in gradients:
            parameter.grad = gradient  # a new parameter, so there is nothing to take back

    def hand_over_gradients(self, before: Mapping[str, _Held], sites: Sequence[Site]) -> None:
        """Those that were accumulated before the surgery, once the new parameters have their numbers: without these nothing can be projected."""
        for swap in self._swaps(before, sites):
            for parameter, gradient in _gradients(swap):
                parameter.grad = gradient

    def _swaps(self, before: Mapping[str, _Held], sites: Sequence[Site]) -> list[Swap]:
        after = {site.name: _held(self.model, site) for site in sites if site.name in before}
        changed = [name for name, held in after.items() if list(map(id, held.parameters)) != list(map(id, before[name].parameters))]
        return [_swap(before[name], after[name]) for name in changed]


def followers_of(model: nn.Module, optimizer: Any, also: Any, state: Any, *, inplace: bool) -> Followers | None:
    """The followers that a caller named, or None where there are none.

    Raises:
        SurgeryValueError, SurgeryTypeError: they cannot follow: the surgery is not in place, or something is no optimizer and no copy.
    """
    rules = as_rules(state)
    optimizers = as_optimizers(optimizer)
    copies = tuple(_copies(model, also))
    if not optimizers and not copies:
        return None
    if not inplace:
        what = "optimizer" if optimizers else "also"
        raise SurgeryValueError(f"{what}: it follows surgery on the model itself only; give inplace=True")
    _check_holds(model, optimizers)
    return Followers(model=model, optimizers=optimizers, copies=copies, rules=rules)


def _check_holds(model: nn.Module, optimizers: Sequence[Any]) -> None:
    """Optimizers of another model would go on training that one: likely a copy was taken in between."""
    mine = {id(p) for p in model.parameters()}
    if optimizers and not any(id(p) in mine for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]):
        raise SurgeryValueError("optimizer: it holds no parameter of this model; give the one that trains it")


def _copies(model: nn.Module, also: Any) -> Iterator[nn.Module]:
    """The modules of the model's class in what was given: copies, or wrappers around them (``AveragedModel`` and the like)."""
    if also is None:
        return
    for index, item in enumerate(also if isinstance(also, list | tuple) else [also]):
        found = item
        while isinstance(found, nn.Module) and not _alike(found, model):
            inner = unwrap(found)
            inner = found._modules.get("module", found) if inner is found else inner  # type: ignore[assignment]
            if inner is found:
                break
            found = inner
        if not isinstance(found, nn.Module) or not _alike(found, model):
            what = type(item).__name__
            raise SurgeryTypeError(
                f"also[{index}]: expected a copy of the {type(model).__name__}, or an AveragedModel or the like of one, got {what}"
            )
        if found is model:
            raise SurgeryValueError(f"also[{index}]: it is the model itself, not a copy of it")
        yield found


def _alike(module: nn.Module, model: nn.Module) -> bool:
    """Of one class; every graph module has a class of its own."""
    return type(module) is type(model) or (isinstance(module, fx.GraphModule) and isinstance(model, fx.GraphModule))


def _held(model: nn.Module, site: Site) -> _Held:
    if site.chain is not None:
        pieces = site.pieces
        last = pieces[-1]
        last_bias: Any = None if last.bias is None else (last.bias, f"{last.name}.bias")
        return _Held(site, tuple(p.weight for p in pieces), tuple(f"{p.name}.weight" for p in pieces), pieces, bias=last_bias)  # type: ignore[misc]
    module = model.get_submodule(site.name)
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    named = None if bias is None else (bias, "bias")
    if weight is not None and computes_weight(module, site.name) is None:
        return _Held(site, (weight,), ("weight",), bias=named)
    found = {name: p for name, p in module.named_parameters() if p is not bias}
    return _Held(site, tuple(found.values()), tuple(found), computed=True, bias=named)


def _swap(before: _Held, after: _Held) -> Swap:
    return Swap(
        name=before.site.name,
        old=before.parameters,
        new=after.parameters,
        old_names=before.names,
        new_names=after.names,
        before=before.chain_map(),
        after=after.chain_map(),
        computed=before.computed,
        renamed=_renamed(before, after),
    )


def _renamed(before: _Held, after: _Held) -> Mapping[int, tuple[str, str]]:
    if before.bias is None or after.bias is None or before.bias[0] is not after.bias[0]:
        return {}
    return {id(before.bias[0]): (before.bias[1], after.bias[1])}


def _gradients(swap: Swap) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """Gradients that were accumulated already, for the new parameters."""
    found = [p.grad for p in swap.old]
    if swap.computed or any(g is None or g.is_sparse for g in found):
        return
    for parameter, gradient in zip(swap.new, gradient_under(swap, found), strict=True):  # type: ignore[arg-type]
        if parameter.requires_grad:
            yield parameter, torch.empty_like(parameter, requires_grad=False).copy_(gradient)


def _follow_in_copy(host: Host, sites: Sequence[Site], swaps: Mapping[str, Swap], what: str) -> None:
    """Cut, cut again or fuse back the layers of a copy as those of the model were."""
    twins = {site.name: site for site in host.sites()}
    if any(swap.after is None for swap in swaps.values()):
        Reconstruct()(host)
        return
    placed: dict[str, tuple[Piece, ...]] = {}
    for site in sites:
        swap = swaps.get(site.tied_to or site.name)
        if swap is None or site.chain is None or swap.after is None:
            continue
        twin = twins.get(site.name)
        _check_alike(twin, site, swap, what)
        placed[site.name] = host.replace(twin, site.chain, _pieces(twin, site.chain, swap.after, placed))  # type: ignore[arg-type]
    host.commit()


def _check_alike(twin: Site | None, site: Site, swap: Swap, what: str) -> None:
    had = None if swap.before is None else swap.before.factorization
    reason = None if twin is None or site.chain is None else twin.keep or refusal_of(twin, site.chain)
    if twin is None or twin.geometry != site.geometry or twin.chain != had or reason is not None:
        found = "no such layer" if twin is None else reason or f"{twin.chain or twin.geometry}"
        raise SurgeryValueError(f"{what}: it is no copy of the model: at {site} it has {found}, the model had {had or site.geometry}")


def _pieces(twin: Site, factorization: Factorization, chain_map: ChainMap, placed: Mapping[str, tuple[Piece, ...]]) -> tuple[Piece, ...]:
    if twin.tied_to is not None and twin.tied_to in placed:
        return tied_pieces(twin, factorization, placed[twin.tied_to])
    with torch.no_grad():
        factors = chain_map.projected(twin.weight.to(chain_map.factors[0]))
    geometries: Sequence[Geometry] = chain_map.geometries
    last = chain_map.names[-1]
    return tuple(
        Piece(name, geometry, factor, twin.bias if name == last else None)
        for name, geometry, factor in zip(chain_map.names, geometries, factors, strict=True)
    )
