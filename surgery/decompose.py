"""``decompose`` and ``plan``: the main verbs. Policy meets passes here; neither chooses ranks nor cuts by itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from passes import Decompose, host_for
from passes.chain import Chain
from passes.errors import SurgeryValueError, true_or_false
from passes.factorization import Keep
from passes.result import PassResult
from passes.running import private_copy
from passes.site import is_layer
from surgery.draft import Draft
from surgery.fitting import learn, mend, usable_batches
from surgery.inspection import (
    check_hooks_kept,
    check_not_quantized,
    check_still_runs,
    hooked_parameters,
    look,
    saved_macs,
    totals_of,
    usable_model,
)
from surgery.options import Options
from surgery.plan import Plan
from surgery.progress import show_progress, stage
from surgery.ranks.budget import Budget
from surgery.ranks.rules import Rule
from surgery.record import (
    SurgeryRecord,
    functions_of,
    fused_in,
    merged_sites,
    params_of_modules,
    put_back_record,
    read_record,
    records_by_name,
    write_record,
)
from surgery.undoing import undone_on_error

if TYPE_CHECKING:
    from surgery.refinement import Refine
    from surgery.training.followers import Followers

__all__ = ["DEFAULT", "DEFAULT_STATE", "Ranks", "decompose", "following", "plan"]

Ranks = str | float | Mapping[str, Any] | Plan | Budget | Rule | os.PathLike[str]
DEFAULT = Options()
DEFAULT_STATE = "project"


def decompose(
    model: nn.Module,
    ranks: Ranks = "evbmf",
    *,
    example_inputs: Any = None,
    method: str = DEFAULT.method,
    include: Any = DEFAULT.include,
    exclude: Any = DEFAULT.exclude,
    guard: str = DEFAULT.guard,
    round_to: int = DEFAULT.round_to,
    calibration: Any = None,
    device: torch.device | str | None = DEFAULT.device,
    effective_weights: bool = DEFAULT.effective_weights,
    refine: Refine | None = None,
    balanced: bool = False,
    optimizer: Any = None,
    also: Any = None,
    state: Any = DEFAULT_STATE,
    inplace: bool = False,
    progress: bool = False,
) -> nn.Module:
    """Rewrite a model's convolutions into small chains: k x k into 1x1, k x k, 1x1 (Tucker), 1x1 into two factors (SVD).

    The layers stay under their names: ``layer1.0.conv1`` becomes ``layer1.0.conv1.{reduce,core,expand}``. Class, ``forward``, hooks and all other
    state of the model stay. ``surgery.report`` tells what became of every layer, ``surgery.reconstruct`` goes back.

    Args:
        model: any module, in any mode, of any float dtype, on any device. A ``GraphModule`` is rewritten node for node.
        ranks: how many channels each chain keeps. ``"evbmf"`` (the default; Nakajima et al. 2012), ``"evbmf:weaken=W"``, ``"evbmf:noise=SHARE"`` or
            ``"evbmf:noise=tucker-1"`` (cuts also where EVBMF sees only noise), ``"energy:P"``, ``"stable"``, a fraction in (0, 1] of the full rank,
            a dict from layer names or ``"re:..."`` patterns to ranks, a ``Plan`` or the path of one, a ``Budget`` for the whole network, or a
            callable ``(site, spectra) -> ranks``. Pairs are (rank_out, rank_in).
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments; with them MACs are known and guarded, and the result is run
            once (eval mode, on a copy): where code fails on a chain that is an error, where another number of tensors comes out a warning.
        method: kind for convolutions with a kernel: ``"tucker"``, ``"spatial"``, ``"channel"``, ``"depthwise"``, ``"cp"`` (ranks by name only), or
            ``"auto"``, which takes for each layer the kind with the smallest error at the MACs of the Tucker ranks that a rule asks for. 1x1
            convolutions and linear layers take SVD; with ``"svd"`` they alone are cut.
        include: names or patterns; only these layers are cut, linear ones too.
        exclude: names or patterns of layers to keep.
        guard: ``"macs"``: a cut by a rule must lower parameters and, with example inputs, MACs; ``"latency"`` or ``"latency:RUNTIME"``: it must be
            measured faster than its layer on these inputs, in eager mode or in that runtime (those of ``Budget(runtime=)``), beyond noise;
            ``"step"``: in forward and backward of training; ``"none"``: anything goes. Under a budget, cuts that do not pass are out from the start,
            and the solver does what it can with the others.
            What is named in a dict or a plan is always done.
        calibration: batches of inputs, unlabelled (or pairs with labels that are whole numbers, which are not used; where the network needs two
            inputs, a pair is these): ranks and factors are then chosen for what these inputs make of the weights and for what the network's output
            makes of the layers' (where it can be differentiated), not for the weights alone; and each chain is corrected in turn
            for the errors made before it, so that each layer gives what it gave. Statistics of batch norms are taken anew where the outputs of
            batches that are held out for it (one in four) show that it helps. (``plan`` only chooses: a plan that is replayed without calibration
            is a split of the weights alone, and the report says so.)
        round_to: a rule's ranks are rounded up to a multiple of this.
        device: where to compute, for example ``"cuda"``; results go back to each weight's device.
        effective_weights: cut also layers whose weight is computed (weight and spectral norm, parametrizations, pruning, weight standardisation), by
            the weight that it amounts to now. What computed it is gone from then on: ``reconstruct`` gives a plain layer.
        refine: after the cut polish all factors together against the outputs of the original network on the calibration batches, unlabelled.
        balanced: scale the layers of each chain to equal norms, by powers of two, so that one step size fits all of them in training;
            factors of a cut with ``calibration``, which are oblique and of very different sizes, are made orthogonal first.
        optimizer: with ``inplace``, the optimizer that trains the model, or a list. New factors take the slot of their layer's weight in its group,
            so that groups and schedulers hold, and the state becomes theirs: momentum m as J^T m, with J the Jacobian of the map from the factors
            to the weight; second moments v as (J * J)^T v times what the average of the same gradients tells of how they add up, never negative
            (see ``surgery.training.chain_map``). Gradients go as momentum does.
        also: with ``inplace``, an averaged copy of the model (``AveragedModel``, a plain copy), or a list of them, cut on the same bases.
        state: ``"project"`` the optimizer's state as said, or ``"reset"``: begin it again for what was cut. A dict from keys of the state to what
            they are (``surgery.training.optimizer.RULES``) projects those of an optimizer that is not known here.
        inplace: work on ``model`` itself; otherwise it is left untouched and a copy is returned.
        progress: show progress on stderr where that is a terminal.

    Needs, beside the model, the memory of one copy of it (for ``inplace``: of the new chains) and of a few copies of its largest layer in float64;
    with example inputs of one more copy of the result, for the run.

    Returns:
        The decomposed model; where nothing is worth cutting, an unchanged one.

    Raises:
        SurgeryTypeError: an argument of a type that has no meaning, or a model that is wrapped or cannot be copied.
        SurgeryValueError: a request that cannot be carried out; the message names the layer or argument. The model is as it was.

    Source: Elhoushi et al. 2019; Kim et al. 2016.
    """
    options = Options(
        method=method, include=include, exclude=exclude, guard=guard, round_to=round_to, device=device, effective_weights=effective_weights
    )
    for argument, value in (("inplace", inplace), ("balanced", balanced), ("progress", progress)):
        true_or_false(argument, value)
    if refine is not None and calibration is None:
        raise SurgeryValueError("refine: needs calibration, batches to polish the factors on")
    batches = None if calibration is None else usable_batches(model, calibration, refine)
    usable_model(model)
    followers = following(model, optimizer, also, state, inplace=inplace)
    if inplace and (is_layer(model) or isinstance(model, Chain)):
        raise SurgeryValueError("inplace=True: the model itself is a layer and has no parent to hold its chain; use the model that is returned")
    from surgery.latency import Stopwatch

    with show_progress(progress), torch.inference_mode(False):  # what is made here must be fit for training
        seen = look(model, example_inputs)
        target = model if inplace else private_copy(model)
        host = host_for(target, observed=seen.observed, private=not inplace, effective_weights=effective_weights)
        sites = host.sites()
        check_not_quantized(model, sites)
        teacher = None if batches is None else private_copy(model)
        stopwatch = Stopwatch(model, example_inputs)
        learning = None if batches is None else partial(learn, model, batches)
        draft = Draft(sites, ranks, options, totals_of(target, seen), learn=learning, stopwatch=stopwatch)
        before, known = records_by_name(target), read_record(target)
        old = known or SurgeryRecord()
        params = params_of_modules(target, sites) if effective_weights else {}
        held = None if followers is None else followers.hold(sites)
        hooked = hooked_parameters(target)
        with undone_on_error() as undo, stage("decomposing", len(sites)) as step:
            cut = Decompose(assignment=draft, spectra=draft.spectra, device=device, progress=step)
            if inplace:
                undo.later(partial(put_back_record, model, known))
                undo.later(host.rollback)
            result = cut(host)
            if inplace:
                check_hooks_kept(target, hooked)
            output_errors = {} if teacher is None else mend(teacher, result, batches or [], refine, undo)
            if balanced:
                _balance(result, oblique=teacher is not None)
            record = SurgeryRecord(
                sites=merged_sites(before, sites, result.outcomes, output_errors=output_errors, params=params),
                passes=old.passes + (("Decompose",) if result.modified else ()),
                macs=old.macs if seen.macs is None else seen.macs + sum(saved_macs(site) or 0 for site in sites) + (fused_in(target)[1] or 0),
                input_shapes=seen.input_shapes or old.input_shapes,
                architecture=old.architecture,
                calibrated=draft.examples if result.modified else old.calibrated,
                fused_params=old.fused_params,
                fused_macs=old.fused_macs,
                functions=functions_of(target) if seen.observed is None else seen.observed.functions,
                latency=draft.latency if result.modified else draft.latency or old.latency,
            )
            write_record(result.model, record)
            if result.modified:
                check_still_runs(result.model, seen, example_inputs)
            if followers is not None:
                followers.follow(held or {}, host.sites(), undo)
    return result.model


def plan(
    model: nn.Module,
    ranks: Ranks = "evbmf",
    *,
    example_inputs: Any = None,
    method: str = DEFAULT.method,
    include: Any = DEFAULT.include,
    exclude: Any = DEFAULT.exclude,
    guard: str = DEFAULT.guard,
    round_to: int = DEFAULT.round_to,
    calibration: Any = None,
    device: torch.device | str | None = DEFAULT.device,
    effective_weights: bool = DEFAULT.effective_weights,
    evaluate: Callable[[nn.Module], float] | None = None,
    max_drop: float = 0.0,
    progress: bool = False,
) -> Plan:
    """What ``decompose`` would do with the same arguments, as a ``Plan`` to read, edit, save and replay. The model is not touched.

    All arguments but these two are those of ``decompose``, and so are the errors.

    Args:
        evaluate: a metric of one's own, of a network, higher is better. ``ranks`` is then a ``Budget`` with the least share of MACs or parameters
            that is wanted, and the plan is for the smallest share from there on at which the metric is at most ``max_drop`` below the original's,
            found by bisection; ``plan.trials`` has what was tried. Replay it with the same ``calibration``.
        max_drop: how far the metric may fall, in its own unit.
    """
    if evaluate is None and max_drop != 0.0:
        raise SurgeryValueError("max_drop: it says how far a metric may fall; give the metric as evaluate")
    if evaluate is not None:
        from surgery.gate import gated_plan

        shared: dict[str, Any] = {"example_inputs": example_inputs, "method": method, "include": include, "exclude": exclude, "guard": guard}
        shared |= {"round_to": round_to, "device": device, "effective_weights": effective_weights, "progress": progress}
        shared["calibration"] = None if calibration is None else usable_batches(model, calibration)
        return gated_plan(
            model, ranks, evaluate, max_drop, lambda budget: plan(model, budget, **shared), lambda found: decompose(model, found, **shared)
        )
    options = Options(
        method=method, include=include, exclude=exclude, guard=guard, round_to=round_to, device=device, effective_weights=effective_weights
    )
    usable_model(model)
    chosen = Plan()
    with show_progress(progress), torch.inference_mode(False):
        draft = Draft.of(model, ranks, options, example_inputs, calibration)
        sites = draft.all_sites
        with stage("planning", len(sites)) as step:
            for site in sites:
                step(site)
                decision = draft[site.name]
                # a chain that stays is named with what it is: replayed on a fresh instance, the plan gives this network
                chosen[site.name] = site.chain if site.chain is not None and isinstance(decision, Keep) else decision
                draft.spectra.let_go(site)
    chosen.latency = draft.latency
    return chosen


def following(model: nn.Module, optimizer: Any, also: Any, state: Any, *, inplace: bool) -> Followers | None:
    """The optimizers and copies that surgery on a model has to take along, or None."""
    if optimizer is None and also is None and state == DEFAULT_STATE:
        return None
    from surgery.training.followers import followers_of

    return followers_of(model, optimizer, also, state, inplace=inplace)


def _balance(result: PassResult, *, oblique: bool) -> None:
    """Of the chains that were cut now; ``oblique`` where their bases are not orthonormal."""
    from surgery.training.balance import balance, orthogonalize

    names = {outcome.site for outcome in result.outcomes if outcome.status == "applied"}
    if oblique:
        orthogonalize(result.model, names)
    balance(result.model, names)
