"""The report: what was done to every convolution and linear layer, with numbers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from passes import host_for
from passes.errors import SurgeryTypeError, SurgeryValueError
from passes.factorization import Factorization
from passes.kinds import kind_of
from passes.outline import Outline
from passes.site import Site
from passes.watching import FunctionUse
from surgery.cost import chain_macs, chain_params, site_params
from surgery.files import as_path, write_atomically
from surgery.record import SiteRecord, functions_of, fused_in, passes_of, read_record, records_by_name, unwrap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from surgery.alternatives import Tradeoff
    from surgery.benchmarking.result import Benchmark
    from surgery.cost.outcome import LatencyOutcome
    from surgery.flow import Flow

__all__ = ["NOT_DECOMPOSED", "LayerReport", "Report", "report", "report_of"]

FORMAT = "surgery.report"
VERSION = 1
NOT_DECOMPOSED = "not decomposed"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """One layer. MACs are those of all its calls in one forward pass of the example inputs, None where none were given.

    Attributes:
        name: first qualified name.
        layer: what it is, or was: class, channels, kernel, stride.
        kind: of the factorization, None for a kept layer.
        status: ``"decomposed"`` or ``"kept"``.
        reason: why it was kept.
        factorization: kind and ranks, None for a kept layer.
        ranks: one a mode, output channels first; None for a mode that is uncut.
        error: |W - W'|_F / |W|_F at the moment of the last cut; where a chain was cut again, W is the weight of that chain.
        output_error: |Y - Y'|_F / |Y|_F of its outputs on the calibration batches, with the errors of the layers before it, just after its chain was
            corrected; None without calibration.
        params_before: of the original module; more than a weight and a bias where its weight was computed from others.
        params_after: of what stands there now.
        macs_before: of the original module's calls.
        macs_after: of the calls of what stands there now.
        compression: weights before over weights after (Elhoushi et al. 2019, equation 10), 1 for a kept layer.
        speedup: MACs before over MACs after (equation 11), 1 for a kept layer, None where MACs are not known.
        calls: calls in one forward pass of the example inputs.
        output_shape: of the first call.
        spectra: singular values of its weight before the last cut, in outline, one a mode in the order of ``ranks``; for a kept layer those that a
            rank rule looked at. Empty where none were looked at, or recorded.
    """

    name: str
    layer: str
    kind: str | None
    status: Literal["decomposed", "kept"]
    reason: str | None
    factorization: Factorization | None
    ranks: tuple[int | None, ...] | None
    error: float | None
    output_error: float | None
    params_before: int
    params_after: int
    macs_before: int | None
    macs_after: int | None
    calls: int | None
    compression: float
    speedup: float | None
    output_shape: tuple[int, ...] | None
    spectra: tuple[Outline, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All layers in the model's order, the totals of the network (every parameter once, attention's MACs included), and the passes that ran.

    ``functions`` are convolutions and linear maps that are no layers: called as functions with weights of their own or computed ones, they are
    never cut. They are known where example inputs were given. ``calibrated`` is the number of examples of the calibration, 0 without. ``latency``
    is what a latency budget came to. ``flow`` is how layers hang together, ``tradeoff`` the least error at every budget that cuts of the original
    network could have had, and ``benchmark`` the times that were measured of the network and its layers, where ``report`` was asked for them.
    """

    layers: tuple[LayerReport, ...]
    params_before: int
    params_after: int
    macs_before: int | None
    macs_after: int | None
    passes: tuple[str, ...]
    calibrated: int = 0
    functions: tuple[FunctionUse, ...] = ()
    latency: LatencyOutcome | None = None
    flow: Flow | None = None
    tradeoff: Tradeoff | None = None
    benchmark: Benchmark | None = None

    @property
    def compression(self) -> float:
        """Parameters of the network before over after."""
        return self.params_before / self.params_after if self.params_after else 1.0

    @property
    def speedup(self) -> float | None:
        """MACs of the network before over after; arithmetic, not time (see ``surgery.benchmark``)."""
        return self.macs_before / self.macs_after if self.macs_before and self.macs_after else None

    @property
    def place(self) -> tuple[float, float] | None:
        """Where this network is beside its trade-off: the share that it uses, and the root mean square of the errors of the layers considered there.

        None without a trade-off, or where the share or an error is not known, or where only layers are cut that are not considered there.
        """
        found = self.tradeoff
        before, after = (self.params_before, self.params_after) if found and found.unit == "params" else (self.macs_before, self.macs_after)
        if found is None or not found.layers or not before or after is None:
            return None
        rows = [row for row in self.layers if row.name in found.layers]
        cut = [row for row in rows if row.status == "decomposed"]
        if any(row.error is None for row in cut) or (not cut and any(row.status == "decomposed" for row in self.layers)):
            return None
        return after / before, (sum((row.error or 0.0) ** 2 for row in rows) / len(found.layers)) ** 0.5

    def __getitem__(self, name: str) -> LayerReport:
        for row in self.layers:
            if row.name == name:
                return row
        raise KeyError(name)

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        layers = []
        for row in self.layers:
            item = {f.name: getattr(row, f.name) for f in fields(row)}
            spectra = [asdict(outline) for outline in row.spectra]
            layers.append(item | {"factorization": row.factorization.to_json() if row.factorization else None, "spectra": spectra})
        totals = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("layers", "functions", "latency", "flow", "tradeoff", "benchmark")
        }
        totals["latency"] = None if self.latency is None else asdict(self.latency)
        totals["tradeoff"] = None if self.tradeoff is None else self.tradeoff.to_data()
        totals["benchmark"] = None if self.benchmark is None else self.benchmark.to_data()
        ratios = {"compression": self.compression, "speedup": self.speedup}
        return {"format": FORMAT, "version": VERSION} | totals | ratios | {"layers": layers, "functions": [_function_data(f) for f in self.functions]}

    def to_json(self) -> str:
        """Deterministic text with format and version."""
        return json.dumps(self.to_data(), indent=1, ensure_ascii=False) + "\n"

    def to_html(self, title: str = "Surgery report") -> str:
        """One self-contained page under this ``title``: totals, every layer with bars, what was kept and why. Nothing in it is fetched or run."""
        from surgery.page import page_of

        return page_of(self, title)

    def save_html(self, path: str | os.PathLike[str], title: str = "Surgery report") -> None:
        """Write ``to_html`` with this ``title`` to the file ``path``; an error leaves whatever was there. ``OSError`` passes through."""
        write_atomically(as_path("path", path), self.to_html(title).encode())

    def plot(self) -> Figure:
        """A Matplotlib figure for papers: MACs (parameters where those are not known) and error of every layer, and the trade-off where it is known.

        ``report.plot().savefig("layers.pdf")``

        Raises:
            MissingExtra: Matplotlib is not installed.
        """
        from surgery.plots import report_figure

        return report_figure(self)

    def _repr_html_(self) -> str:
        from surgery.tables import report_table, to_html

        return to_html(report_table(self))

    def __str__(self) -> str:
        from surgery.tables import render, report_table

        return render(report_table(self))


def report(model: nn.Module, *, example_inputs: Any = None, before: nn.Module | None = None, benchmark: Benchmark | None = None) -> Report:
    """What was done to every convolution and linear layer of a model.

    Looks through ``torch.compile`` and parallel wrappers. Reports of submodules that were decomposed on their own merge under their prefix. A model
    to which nothing was done says "not decomposed" on every row.

    Args:
        model: decomposed or not; it is not touched.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments; with them the report knows the graph (``flow``), drawn on
            its page. The MACs are those of the inputs that were given when it was cut.
        before: the network that the model was made from; with it the report knows what other budgets would have cost in error (``tradeoff``).
        benchmark: what ``surgery.benchmark(original, model, inputs, layers=True)`` found: its times stand beside MACs and parameters on the
            page. That it is of this model is checked by the names of its layers, and so not without ``layers``.

    Raises:
        SurgeryTypeError: ``model`` or ``before`` is no module, ``benchmark`` no result of ``surgery.benchmark``, or a model whose graph is asked for
            is itself a single layer.
        SurgeryValueError: the model does not accept the inputs, or ``before`` or ``benchmark`` has other layers.
    """
    if not isinstance(model, nn.Module):
        raise SurgeryTypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if benchmark is not None:
        _check_benchmark(benchmark)
    inner = unwrap(model)
    record = read_record(inner)
    fused_params, fused_macs = fused_in(inner)
    made = report_of(
        host_for(inner).sites(),
        records_by_name(inner),
        params=sum(p.numel() for p in inner.parameters()),
        macs=None if record is None else record.macs,
        passes=passes_of(inner),
        fused_params=fused_params,
        fused_macs=fused_macs,
        calibrated=0 if record is None else record.calibrated,
        functions=functions_of(inner),
        latency=None if record is None else record.latency,
    )
    if example_inputs is not None:
        from surgery.flow import flow_of

        made = replace(made, flow=flow_of(inner, example_inputs))
    if before is not None:
        from surgery.original import tradeoff_before

        made = replace(made, tradeoff=tradeoff_before(before, inner, made, example_inputs))
    return made if benchmark is None else _timed(made, benchmark)


def _check_benchmark(benchmark: Any) -> None:
    from surgery.benchmarking.result import Benchmark

    if not isinstance(benchmark, Benchmark):
        raise SurgeryTypeError(f"benchmark: expected what surgery.benchmark returns, got {type(benchmark).__name__}")


def _timed(report: Report, benchmark: Benchmark) -> Report:
    """The report with the times of its layers, as far as can be told those of its model."""
    names = {row.name for row in report.layers}
    strange = next((layer.name for layer in benchmark.layers if layer.name not in names), None)
    if strange is not None:
        raise SurgeryValueError(f"benchmark: it has times of a layer {strange!r}, which this model has not; give the one of this model")
    return replace(report, benchmark=benchmark)


def report_of(
    sites: Sequence[Site],
    records: Mapping[str, SiteRecord],
    *,
    params: int,
    macs: int | None,
    passes: tuple[str, ...],
    fused_params: int = 0,
    fused_macs: int | None = 0,
    calibrated: int = 0,
    functions: tuple[FunctionUse, ...] = (),
    latency: LatencyOutcome | None = None,
) -> Report:
    """The report of sites, and of what is known of them by name.

    Args:
        params: those that the network has now.
        macs: those that the original network had.
    """
    rows = []
    unknown = fused_macs is None
    saved_params = saved_macs = 0
    for site in sites:
        row = _row(site, records.get(site.name))
        rows.append(row)
        saved_params += row.params_before - row.params_after
        if row.macs_before is None or row.macs_after is None:
            unknown = unknown or row.status == "decomposed"
        else:
            saved_macs += row.macs_before - row.macs_after
    macs = None if unknown else macs
    return Report(
        layers=tuple(rows),
        params_before=params + saved_params + fused_params,
        params_after=params,
        macs_before=macs,
        macs_after=None if macs is None else macs - saved_macs - (fused_macs or 0),
        passes=passes,
        calibrated=calibrated,
        functions=functions,
        latency=latency,
    )


def _function_data(function: FunctionUse) -> dict[str, Any]:
    shapes = {"input_shapes": [c.input_shape for c in function.calls], "output_shapes": [c.output_shape for c in function.calls]}
    return {f.name: getattr(function, f.name) for f in fields(function)} | {"calls": len(function.calls)} | shapes


def _row(site: Site, known: SiteRecord | None) -> LayerReport:
    calls = known.calls if known is not None and known.calls is not None else site.calls
    params = site_params(site) - (site.geometry.weights if site.tied_to else 0)  # a tied weight counts where it comes first
    macs = None if calls is None else sum(site.geometry.macs(c.input_shape) for c in calls)
    params_before = params if known is None or known.params is None else known.params
    params_after, macs_after, compression = params, macs, 1.0
    reason: str | None = (known.reason if known is not None else None) or NOT_DECOMPOSED
    if site.chain is not None:
        shapes = kind_of(site.chain).shapes(site.geometry, site.chain, site.bias is not None)
        params_after, macs_after = chain_params(shapes), chain_macs(shapes, calls)
        params_after -= sum(s.geometry.weights for s in shapes) if site.tied_to else 0
        compression = prod(site.geometry.weight_shape) / sum(prod(s.geometry.weight_shape) for s in shapes)
        reason = None
    return LayerReport(
        name=site.name,
        layer=str(site.geometry),
        kind=None if site.chain is None else site.chain.kind,
        status="kept" if site.chain is None else "decomposed",
        reason=reason,
        factorization=site.chain,
        ranks=None if site.chain is None else site.chain.ranks,
        error=None if known is None else known.error,
        output_error=None if known is None or site.chain is None else known.output_error,
        params_before=params_before,
        params_after=params_after,
        macs_before=macs,
        macs_after=macs_after,
        calls=None if calls is None else len(calls),
        compression=compression,
        speedup=macs / macs_after if macs and macs_after else None,
        output_shape=calls[0].output_shape if calls else None,
        spectra=() if known is None else known.spectra,
    )
