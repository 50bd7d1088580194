"""``reconstruct``: the way back to the original architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from passes import PassResult, Reconstruct, host_for, name_of
from passes.chain import Chain
from passes.errors import SurgeryValueError, true_or_false
from passes.result import Outcome
from passes.running import private_copy
from surgery.decompose import DEFAULT_STATE, following
from surgery.inspection import check_hooks_kept, hooked_parameters, look, saved_macs, usable_model
from surgery.record import SiteRecord, SurgeryRecord, fused_in, merged_sites, put_back_record, read_record, records_by_name, write_record
from surgery.undoing import Undo, undone_on_error

if TYPE_CHECKING:
    from surgery.training.followers import Followers

__all__ = ["reconstruct"]

REASON = "reconstructed"
NOT_FUSED = "not fused: "


def reconstruct(
    model: nn.Module,
    *,
    foreign: bool = False,
    example_inputs: Any = None,
    optimizer: Any = None,
    also: Any = None,
    state: Any = DEFAULT_STATE,
    inplace: bool = False,
) -> nn.Module:
    """Fuse every chain that ``decompose`` made back into one layer: same classes, same ``state_dict`` keys, order and shapes as the original.

    The function stays the same to rounding. What truncation took away does not come back: the weights are those of the chains.

    With ``foreign`` linear runs that somebody wrote by hand are fused too, whatever that costs, with eval semantics: 1x1, k x k, 1x1; k x 1, 1 x k;
    a layer and its batch norm (see ``passes.FuseLinearRuns``). Only what is proved is fused: on a ``GraphModule`` by its graph, else by a verified
    trace on ``example_inputs``, else where all is plain ``nn.Sequential`` from the root down. On a graph the other nodes disappear, in a module
    their places hold an ``nn.Identity``. The report has the reason for every layer, and totals before and after. A network that was changed so
    can be exported, but not saved.

    Args:
        model: a decomposed model, or a ``GraphModule`` with decomposed nodes; with nothing to fuse it is returned unchanged.
        foreign: also fuse what this project did not cut.
        example_inputs: for ``foreign`` only: a tensor, a tuple of positional or a mapping of keyword arguments; with them MACs are known.
        optimizer: with ``inplace``, as for ``decompose``: each weight takes the slot of its chain's factors in their group. Momentum m becomes the
            smallest one which is m for the factors, J (J^T J)^+ m; second moments likewise, never negative (see ``surgery.training.chain_map``).
        also: with ``inplace``, averaged copies of the model, fused back with it.
        state: as for ``decompose``.
        inplace: work on ``model`` itself; otherwise it is left untouched and a copy is returned.

    Raises:
        SurgeryTypeError: a model that is wrapped or cannot be copied.
        SurgeryValueError: ``inplace=True`` on a model that is itself a chain; ``optimizer`` or ``also`` without ``inplace``, or with
            ``foreign``; ``example_inputs`` without ``foreign``, or not fit for the model.
        SurgeryError: the fused model computes something else, because code of its own reads more of its layers than their outputs.

    Source: Elhoushi et al. 2019, section 3, step 5.
    """
    true_or_false("foreign", foreign)
    true_or_false("inplace", inplace)
    usable_model(model)
    if inplace and isinstance(model, Chain):
        raise SurgeryValueError("inplace=True: the model itself is a chain and has no parent to hold its layer; use the layer that is returned")
    if example_inputs is not None and not foreign:
        raise SurgeryValueError("example_inputs: they prove what foreign chains may be fused; give foreign=True with them")
    followers = following(model, optimizer, also, state, inplace=inplace)
    if foreign and followers is not None:
        raise SurgeryValueError(
            "foreign=True: fusing what somebody else wrote is for networks that are trained no more; leave optimizer and also out"
        )
    known = read_record(model)
    with torch.inference_mode(False), undone_on_error() as undo:
        target = model if inplace else private_copy(model)
        if inplace:
            undo.later(partial(put_back_record, model, known))
        target = _fuse_own(target, undo, inplace, followers)
        return _fuse_foreign(target, example_inputs, undo, inplace) if foreign else target


def _fuse_own(target: nn.Module, undo: Undo, inplace: bool, followers: Followers | None) -> nn.Module:
    host = host_for(target, private=not inplace)
    if inplace:
        undo.later(host.rollback)
    sites, before, old = host.sites(), records_by_name(target), read_record(target) or SurgeryRecord()
    held, hooked = None if followers is None else followers.hold(sites), hooked_parameters(target)
    result = Reconstruct()(host)
    if inplace:
        check_hooks_kept(target, hooked)
    if result.modified:
        outcomes = tuple(
            Outcome(o.site, o.status, REASON if o.status == "applied" else o.reason, before[o.site].error if o.site in before else None)
            for o in result.outcomes
        )
        record = replace(old, sites=merged_sites(before, sites, outcomes), passes=(*old.passes, "Reconstruct"), latency=None)
        write_record(result.model, record)
    if followers is not None:
        followers.follow(held or {}, host.sites(), undo)
    return result.model


def _fuse_foreign(target: nn.Module, example_inputs: Any, undo: Undo, inplace: bool) -> nn.Module:
    seen = look(target, example_inputs)
    host = host_for(target, example_inputs, observed=seen.observed, private=not inplace)
    if inplace:
        undo.later(host.rollback)
    before, old, sites = records_by_name(target), read_record(target) or SurgeryRecord(), host.sites()
    params = sum(p.numel() for p in target.parameters())
    from passes.cleanup import FuseLinearRuns

    result = FuseLinearRuns()(host)
    saved, fused = _saved_macs(result), {o.site for o in result.outcomes if o.status == "applied"}
    before = {name: replace(known, calls=None) if name in fused else known for name, known in before.items()}  # they were another layer's
    record = replace(
        old,
        sites=merged_sites(before, host.sites(), _told(result, before)),
        passes=old.passes + ((name_of(FuseLinearRuns()),) if result.modified else ()),
        macs=old.macs if seen.macs is None else seen.macs + sum(saved_macs(site) or 0 for site in sites) + (fused_in(target)[1] or 0),
        input_shapes=seen.input_shapes or old.input_shapes,
        fused_params=old.fused_params + params - sum(p.numel() for p in result.model.parameters()),
        fused_macs=None if old.fused_macs is None or saved is None else old.fused_macs + saved,
    )
    write_record(result.model, record)
    return result.model


def _saved_macs(result: PassResult) -> int | None:
    """MACs that fusing took away, None where they are not known."""
    fused = [o for o in result.outcomes if o.params_after is not None]
    if any(o.macs_before is None or o.macs_after is None for o in fused):
        return None
    return sum((o.macs_before or 0) - (o.macs_after or 0) for o in fused)


def _told(result: PassResult, before: Mapping[str, SiteRecord]) -> tuple[Outcome, ...]:
    """Outcomes for the report's rows: what was known of a layer that was not fused, and why it was not."""
    return tuple(o if o.status == "applied" else replace(o, reason=_with_reason(before.get(o.site), o.reason)) for o in result.outcomes)


def _with_reason(known: SiteRecord | None, reason: str | None) -> str:
    earlier = (known.reason if known is not None and known.reason else "").partition(NOT_FUSED)[0].removesuffix("; ")
    return "; ".join(part for part in (earlier, f"{NOT_FUSED}{reason}") if part)
