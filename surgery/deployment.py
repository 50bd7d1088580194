"""``deploy``: a network ready for export, cleaned of all that only training needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from passes import DropIdentities, FoldBatchNorm, MergePointwise, Pass, PassResult, host_for, name_of, run_pipeline
from passes.errors import SurgeryError, SurgeryValueError
from passes.functional_norms import norms_as_modules
from passes.parity import assert_parity
from passes.result import Outcome
from passes.running import evaluating_copy, output_of
from passes.site import Site
from surgery.cost import count_macs
from surgery.inspection import look, saved_macs, usable_model
from surgery.record import SurgeryRecord, merged_sites, records_by_name, whole_record, write_record
from surgery.report import report
from surgery.tracing import trace

__all__ = ["deploy"]

PASSES: tuple[Pass, ...] = (DropIdentities(), FoldBatchNorm(), MergePointwise())


def deploy(model: nn.Module, example_inputs: Any) -> nn.Module:
    """The network for inference: identities and dropout gone, batch norms folded, neighbouring 1x1 layers merged where that lowers MACs.

    It is a flat graph (``surgery.trace``) in eval mode. A model that cannot be traced is cleaned in place on a copy, and only where all is plain
    ``nn.Sequential`` from the root down. On the graph, batch norms that a class calls as functions are folded too, and checks of nothing but
    sizes (``torch._assert``) are dropped. Either way the result is compared with the model on the example inputs. ``surgery.report`` tells what
    became of the layers; chains whose layers were merged cannot be reconstructed any more. It is for exporting: it cannot be saved, and train mode
    means nothing to it.

    Args:
        model: any module, decomposed or not; it is left untouched.
        example_inputs: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.

    Raises:
        SurgeryTypeError: the model is wrapped or cannot be copied.
        SurgeryValueError: the model does not accept the inputs.
        ParityError: the cleaned network does not compute the same; nothing is returned.
    """
    usable_model(model)
    with torch.inference_mode(False):
        twin = evaluating_copy(model)
        seen, before = look(twin, example_inputs), report(twin)
        saved = sum(saved_macs(site) or 0 for site in host_for(twin, observed=seen.observed).sites())
        gradients = seen.observed is not None and seen.observed.gradients
        expected = output_of(twin, example_inputs, gradients=gradients)
        target = _graph_of(twin, example_inputs)
        host = host_for(target, example_inputs, private=True)
        results = run_pipeline(PASSES, host)
        net = results[-1].model
        with count_macs() as counter:
            got = output_of(net, example_inputs, gradients=gradients)
        assert_parity(got, expected, training=True, what="the network before and after its clean-up")
        known, records = whole_record(twin) or SurgeryRecord(), records_by_name(target)
        sites = host_for(net, example_inputs).sites()
        record = replace(
            known,
            sites=merged_sites(records, sites, _told(results, sites)),
            passes=known.passes + tuple(name_of(step) for step, result in zip(PASSES, results, strict=True) if result.modified),
            macs=None if seen.macs is None or known.fused_macs is None else seen.macs + saved + known.fused_macs,
            input_shapes=seen.input_shapes,
            fused_params=0,
            fused_macs=0,
        )
        write_record(net, record)
        after = report(net)
        if after.macs_after is not None:
            record = replace(record, fused_macs=after.macs_after - counter.macs)
        write_record(net, replace(record, fused_params=before.params_before - after.params_before))
    return net


def _graph_of(model: nn.Module, example_inputs: Any) -> nn.Module:
    """The model's verified trace where there is one, else the model."""
    try:
        traced = model if isinstance(model, fx.GraphModule) else trace(model, example_inputs)
    except SurgeryValueError:  # it does not accept the inputs
        raise
    except SurgeryError:
        return model
    norms_as_modules(traced)
    return traced


def _told(results: Sequence[PassResult], sites: Sequence[Site]) -> tuple[Outcome, ...]:
    """One outcome a site, of all that was applied to it or to the chain that it was a layer of."""
    reasons: dict[str, list[str]] = {}
    for step, result in zip(PASSES, results, strict=True):
        for outcome in result.outcomes:
            if outcome.status == "applied" and outcome.reason is not None:
                reasons.setdefault(outcome.site, []).append(f"{name_of(step)}: {outcome.reason}")
    for site in sites:
        if site.name not in reasons and (chain := site.name.rpartition(".")[0]) in reasons:
            reasons[site.name] = [f"a layer of {chain} ({'; '.join(reasons[chain])})"]
    return tuple(Outcome(site, "applied", "; ".join(told)) for site, told in reasons.items())
