"""``reconstruct``: the way back to the original architecture."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from passes import Reconstruct, host_for
from passes.capture import private_copy
from passes.chain import Chain
from passes.errors import SurgeryValueError
from passes.result import Outcome
from surgery.decompose import usable_model
from surgery.record import SurgeryRecord, merged_sites, read_record, records_by_name, write_record

__all__ = ["reconstruct"]

REASON = "reconstructed"


def reconstruct(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Fuse every chain that ``decompose`` made back into one layer: same classes, same ``state_dict`` keys, order and shapes as the original.

    The function stays the same to rounding. What truncation took away does not come back: the weights are those of the chains.

    Args:
        model: a decomposed model, or a ``GraphModule`` with decomposed nodes; with no chains it is returned unchanged.
        inplace: work on ``model`` itself; otherwise it is left untouched and a copy is returned.

    Raises:
        SurgeryTypeError: a model that is wrapped or cannot be copied.
        SurgeryValueError: ``inplace=True`` on a model that is itself a chain.

    Source: Elhoushi et al. 2019, section 3, step 5.
    """
    usable_model(model)
    if inplace and isinstance(model, Chain):
        raise SurgeryValueError("inplace=True: the model itself is a chain and has no parent to hold its layer; use the layer that is returned")
    with torch.inference_mode(False):
        target = model if inplace else private_copy(model)
        host = host_for(target, private=not inplace)
        sites, before, old = host.sites(), records_by_name(target), read_record(target) or SurgeryRecord()
        try:
            result = Reconstruct()(host)
            if result.modified:
                outcomes = tuple(
                    Outcome(o.site, o.status, REASON if o.status == "applied" else o.reason, before[o.site].error if o.site in before else None)
                    for o in result.outcomes
                )
                record = replace(old, sites=merged_sites(before, sites, outcomes), passes=(*old.passes, "Reconstruct"))
                write_record(result.model, record)
        except BaseException:
            if inplace:
                host.rollback()
            raise
    return result.model
