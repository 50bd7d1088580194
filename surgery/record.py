"""What was done to a model, kept on the model itself: never in its ``state_dict``, and it survives ``deepcopy``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from passes.outline import Outline
from passes.result import Outcome
from passes.site import Call, Site, named_groups
from passes.watching import COMPUTED, FunctionUse
from surgery.cost import site_params

if TYPE_CHECKING:
    from surgery.cost.outcome import LatencyOutcome

__all__ = [
    "SiteRecord",
    "SurgeryRecord",
    "functions_of",
    "fused_in",
    "merged_sites",
    "params_of_modules",
    "passes_of",
    "put_back_record",
    "read_record",
    "records_by_name",
    "unwrap",
    "whole_record",
    "write_record",
]

KEY = "surgery_record"


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteRecord:
    """What is known of one site: why it was kept, or the relative error of the cut, and its calls in the original network.

    ``output_error`` is the relative error of its outputs over the calibration batches, where there were any.
    ``spectra`` are those of its weight before the last cut, one a mode of the kind, in outline.
    ``params`` are those of the original module where it held others than a weight and a bias (what its weight was computed from), else None.
    """

    name: str
    reason: str | None
    error: float | None
    calls: tuple[Call, ...] | None
    output_error: float | None = None
    params: int | None = None
    spectra: tuple[Outline, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SurgeryRecord:
    """Everything that was done to a model.

    Attributes:
        sites: one record a site, by name relative to the model.
        passes: names of the passes that changed something, in order.
        macs: of one forward pass of the original network; None where no example inputs were given.
        input_shapes: shapes of all tensors in the example inputs.
        architecture: the registry name that the model was made from, if it was.
        calibrated: how many examples the last cut was calibrated on; 0 where it saw the weights alone.
        fused_params: parameters that clean-up passes took away, beyond what the rows of chains show; negative where they added some.
        fused_macs: the same of MACs; None where they are not known.
        functions: convolutions and linear maps that the example inputs met as functions, which are never cut.
        latency: what a latency budget came to.
    """

    sites: tuple[SiteRecord, ...] = ()
    passes: tuple[str, ...] = ()
    macs: int | None = None
    input_shapes: tuple[tuple[int, ...], ...] | None = None
    architecture: str | None = None
    calibrated: int = 0
    fused_params: int = 0
    fused_macs: int | None = 0
    functions: tuple[FunctionUse, ...] = ()
    latency: LatencyOutcome | None = None


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile`` and parallel wrappers."""
    inner: Any = model
    while True:
        if "_orig_mod" in inner._modules:
            inner = inner._modules["_orig_mod"]
        elif isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = inner.module
        else:
            return inner  # type: ignore[no-any-return]


def read_record(model: nn.Module) -> SurgeryRecord | None:
    """The record of exactly this module, if it has one."""
    found = model.meta.get(KEY) if isinstance(model, fx.GraphModule) else model.__dict__.get(KEY)
    return found if isinstance(found, SurgeryRecord) else None


def write_record(model: nn.Module, record: SurgeryRecord) -> None:
    if isinstance(model, fx.GraphModule):
        model.meta = {**model.meta, KEY: record}  # a deepcopy of a graph module shares the old mapping
    else:
        model.__dict__[KEY] = record


def put_back_record(model: nn.Module, record: SurgeryRecord | None) -> None:
    """The record of exactly this module as it was read before: none where there was none."""
    if record is not None:
        write_record(model, record)
    elif isinstance(model, fx.GraphModule):
        model.meta = {key: value for key, value in model.meta.items() if key != KEY}
    else:
        model.__dict__.pop(KEY, None)


def records_by_name(model: nn.Module) -> dict[str, SiteRecord]:
    """All site records of the model and its submodules under their full names; an outer record says more than an inner one."""
    found: dict[str, SiteRecord] = {}
    for module, names in named_groups(model):
        record = read_record(module)
        for site in record.sites if record else ():
            name = ".".join(part for part in (names[0], site.name) if part)
            found.setdefault(name, replace(site, name=name))
    return found


def passes_of(model: nn.Module) -> tuple[str, ...]:
    """Passes that changed the model or a submodule, the model's own last."""
    own = read_record(model)
    inner = [r for module, names in named_groups(model) if names[0] and (r := read_record(module)) is not None]
    return (*(p for r in inner for p in r.passes), *(own.passes if own else ()))


def fused_in(model: nn.Module) -> tuple[int, int | None]:
    """Parameters and MACs that clean-up passes took away from the model and from submodules on their own; MACs None where some are not known."""
    records = [record for module, _ in named_groups(model) if (record := read_record(module)) is not None]
    macs = [record.fused_macs for record in records]
    return sum(record.fused_params for record in records), None if None in macs else sum(n for n in macs if n is not None)


def functions_of(model: nn.Module) -> tuple[FunctionUse, ...]:
    """Convolutions and linear maps called as functions, by the model's record or, where it was not run as a whole, by those of its submodules."""
    own = read_record(model)
    if own is not None and (own.functions or own.input_shapes is not None):
        return own.functions
    functions: list[FunctionUse] = []
    seen: list[str] = []  # submodules that were run as a whole: their records say more than those inside them
    for module, names in named_groups(model):
        record, prefix = read_record(module), names[0]
        if record is None or any(prefix.startswith(outer + ".") for outer in seen):
            continue
        functions += [_under(prefix, function) for function in record.functions]
        if prefix and record.input_shapes is not None:
            seen.append(prefix)
    return tuple(functions)


def _under(prefix: str, function: FunctionUse) -> FunctionUse:
    def joined(name: str) -> str:
        return ".".join(part for part in (prefix, name) if part)

    return replace(function, module=joined(function.module), weight=function.weight if function.weight == COMPUTED else joined(function.weight))


def whole_record(model: nn.Module) -> SurgeryRecord | None:
    """One record of everything that was done to the model and its submodules; None where nothing is known."""
    own, sites = read_record(model), tuple(records_by_name(model).values())
    if own is None and not sites:
        return None
    params, macs = fused_in(model)
    return replace(own or SurgeryRecord(), sites=sites, passes=passes_of(model), functions=functions_of(model), fused_params=params, fused_macs=macs)


def params_of_modules(model: nn.Module, sites: tuple[Site, ...]) -> dict[str, int]:
    """Parameters of the modules at sites that are no chains, where these are others than a weight and a bias: the weight is computed from them."""
    counts = {site.name: sum(p.numel() for p in model.get_submodule(site.name).parameters()) for site in sites if site.chain is None}
    return {site.name: counts[site.name] for site in sites if site.chain is None and counts[site.name] != site_params(site)}


def merged_sites(
    before: dict[str, SiteRecord],
    sites: tuple[Site, ...],
    outcomes: tuple[Outcome, ...],
    *,
    output_errors: Mapping[str, float] | None = None,
    params: Mapping[str, int] | None = None,
) -> tuple[SiteRecord, ...]:
    """Records after a pass: what it applied or kept, with what was known of chains that it left alone.

    ``params`` are those of modules that were more than a weight and a bias (``params_of_modules``, before the pass).
    """
    by_name = {outcome.site: outcome for outcome in outcomes}
    records = []
    for site in sites:
        known, outcome = before.get(site.name), by_name.get(site.name)
        calls = site.calls if site.calls is not None else (known.calls if known else None)
        output_error = (output_errors or {}).get(site.name)
        if outcome is None or (site.chain is not None and outcome.status == "kept"):
            reason, error = (known.reason, known.error) if known else (None, None)
            output_error = known.output_error if known else None
        elif outcome.status == "applied":
            reason, error = outcome.reason, outcome.error
        else:
            reason, error = outcome.reason, known.error if known else None
        replaced = (params or {}).get(site.name) if outcome is not None and outcome.status == "applied" else None
        count = replaced if replaced is not None else known.params if known else None
        spectra = (outcome.spectra if outcome is not None else ()) or (known.spectra if known is not None else ())
        records.append(SiteRecord(name=site.name, reason=reason, error=error, calls=calls, output_error=output_error, params=count, spectra=spectra))
    return tuple(records)
