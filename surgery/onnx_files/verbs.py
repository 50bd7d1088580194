"""``decompose_onnx``, ``reconstruct_onnx``, ``plan_onnx`` and ``report_onnx``: the main verbs on files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from itertools import chain, count
from math import inf, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from passes import Decompose, Reconstruct, name_of
from passes.errors import SurgeryError, SurgeryValueError
from passes.factorization import Keep
from passes.result import PassResult
from passes.site import Site
from surgery.calibration import Calibration
from surgery.decompose import DEFAULT, Ranks
from surgery.draft import Draft
from surgery.export.common import installed, need
from surgery.files import usable_target
from surgery.inspection import saved_macs
from surgery.onnx_files.check import merged_copy, prove
from surgery.onnx_files.feeds import Feed, example_feed, open_inputs, shapes_of_feed, takes_numbers
from surgery.onnx_files.files import copied, data_files, has_external_data, open_model, write_model
from surgery.onnx_files.graph import Constant, Graph, tensor_dtype
from surgery.onnx_files.host import OnnxHost
from surgery.onnx_files.record import FileRecord, read_file_record, write_plan, write_report
from surgery.onnx_files.shapes import network_macs, unknown_values, value_shapes
from surgery.onnx_files.watch import watched
from surgery.options import Options, runtime_of
from surgery.plan import Plan
from surgery.progress import show_progress, stage
from surgery.ranks.budget import Budget, Totals
from surgery.ranks.request import parse_ranks
from surgery.report import Report, report_of

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["OnnxResult", "decompose_onnx", "plan_onnx", "reconstruct_onnx", "report_onnx"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxResult:
    """What surgery on an ONNX file gave.

    Attributes:
        path: the file that was written.
        report: what was done to every layer; MACs are those of the sizes that it was run with.
        rounding: largest max |a - b| / max |b| between the written file and the network with its chains merged, in onnxruntime on noise and on
            the example inputs (of integer and bool outputs the share of entries that differ); None where nothing was checked.
        difference: the same between the written file and the one that it was made from: what truncation did.
        size_bytes: of the file and of the one beside it that has its weights, if there is one.
    """

    path: str
    report: Report
    rounding: float | None
    difference: float | None
    size_bytes: int

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON: the report's, and the rest under ``"file"``."""
        file = {name: None if value == inf else value for name, value in asdict(self).items() if name != "report"}  # JSON has no infinity
        return self.report.to_data() | {"file": file}

    def __str__(self) -> str:
        return f"{self.report}\n{self.told()}"

    def told(self) -> str:
        """What was written and how it was checked, in a line."""
        checked = "not checked"
        if self.rounding is not None and self.difference is not None:
            checked = f"correct to {self.rounding:.1e}; outputs on noise differ from the original's by {self.difference:.1e}"
        return f"{self.path}: {self.size_bytes / 1e6:.2f} MB, {checked}"


def decompose_onnx(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
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
    check: bool = True,
    progress: bool = False,
) -> OnnxResult:
    """Rewrite the convolutions of an ONNX file into small chains, as ``decompose`` does with those of a module.

    Layers bear the names of their nodes (of their outputs where they have none). The file that was read stays as it is; what is written appears
    whole or not at all, and tells in its metadata how it was made (``exported_plan``, ``report_onnx``, ``reconstruct_onnx``). Where the
    weights were in a file of their own, they are again, in ``OUT.data``. A weight that was an input with a default is none any more.

    Args:
        path: the file to read.
        out: the file to write; it may be the same.
        ranks: as for ``decompose``; budgets of time are not for files.
        example_inputs: an array or tensor, several in the order of the inputs, or a mapping from their names. MACs are counted at their sizes. Not
            needed where the file leaves open the first dimension of its inputs at most: then they are noise.
        method: as for ``decompose``, like all that is not said here.
        include: names or patterns; only these layers are cut, linear ones (``Gemm``, ``MatMul``) too.
        exclude: names or patterns of layers to keep.
        guard: ``"macs"`` or ``"none"``.
        round_to: a rule's ranks are rounded up to a multiple of this.
        calibration: batches of inputs, each as ``example_inputs``: ranks and factors are then chosen for what these make the layers see and for
            what the network's outputs make of the layers' (measured, by changing each layer a little); errors are those of the layers' outputs;
            and each chain is corrected in turn for the errors made before it. No batch norm is touched.
        device: where to compute.
        check: run the file in onnxruntime against the network with its chains merged into single layers, and compare it with the original.
        progress: show progress on stderr where that is a terminal.

    Raises:
        MissingExtra: onnxruntime is not installed and ``check`` is asked for.
        ParityError: the written file computes something else than its chains merged. Nothing is written.
        SurgeryValueError: no ONNX file, or a request that cannot be carried out.
        OSError: a file cannot be read or written.
    """
    options = Options(method=method, include=include, exclude=exclude, guard=guard, round_to=round_to, device=device)
    target = usable_target("out", out)
    work = _opened(path, example_inputs, ranks, options, check=check)
    with show_progress(progress), stage("decomposing", len(work.sites)) as step:
        feeds = work.feeds(calibration)
        draft = work.draft(ranks, options, feeds)
        original = copied(work.model) if feeds else work.model
        result = Decompose(assignment=draft, spectra=draft.spectra, device=device, progress=step)(work.host)
        corrected = work.correct(original, result, feeds)
    record = read_file_record(work.model)
    reasons = {o.site: o.reason for o in result.outcomes if o.status == "kept" and o.reason is not None}
    chains = {site.name: site.chain for site in work.host.sites()}
    record.plan = Plan({name: chain or Keep(reasons.get(name, "kept")) for name, chain in chains.items()})
    record.calibrated = draft.examples if result.modified else record.calibrated
    record.errors |= {o.site: o.error for o in result.outcomes if o.error is not None}
    _forget_output_errors(record, result)
    record.output_errors |= corrected
    return _finished(work, record, name_of(Decompose(assignment={})) if result.modified else None, target, cut=True, check=check)


def plan_onnx(
    path: str | os.PathLike[str],
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
) -> Plan:
    """What ``decompose_onnx`` would do with the same arguments, as a ``Plan``: to read, edit, save, and give it as ``ranks``.

    All arguments are those of ``decompose_onnx``, and so are the errors.
    """
    options = Options(method=method, include=include, exclude=exclude, guard=guard, round_to=round_to, device=device)
    work = _opened(path, example_inputs, ranks, options, check=False)
    draft, chosen = work.draft(ranks, options, work.feeds(calibration)), Plan()
    for site in work.sites:
        decision = draft[site.name]
        chosen[site.name] = site.chain if site.chain is not None and isinstance(decision, Keep) else decision
        draft.spectra.let_go(site)
    return chosen


def reconstruct_onnx(path: str | os.PathLike[str], out: str | os.PathLike[str], *, example_inputs: Any = None, check: bool = True) -> OnnxResult:
    """Fuse every chain in an ONNX file back into one node: of a file that ``decompose_onnx`` wrote, or ``export_onnx`` of a decomposed network.

    The function stays the same to rounding; what truncation took away does not come back. Nodes and weights have the names that they had.

    Args:
        path: the file to read.
        out: the file to write; it may be the same.
        example_inputs: as for ``decompose_onnx``, for the check.
        check: compare both files in onnxruntime.

    Raises:
        SurgeryValueError: no ONNX file, or one in which there is no chain that surgery made.
        ParityError: the written file computes something else. Nothing is written.
    """
    target = usable_target("out", out)
    work = _opened(path, example_inputs, {}, DEFAULT, check=check)
    if not any(site.chain is not None for site in work.sites):
        planned = sum(not isinstance(decision, Keep) for decision in read_file_record(work.model).plan.values())
        hint = f"; its plan names {planned}, but the nodes of none are as they were written: was the file optimized?" if planned else ""
        raise SurgeryValueError(f"{work.source}: it holds no chain that surgery made, so there is nothing to fuse{hint}")
    result = Reconstruct()(work.host)
    record = read_file_record(work.model)
    restored = _forget_output_errors(record, result)
    record.plan = Plan({site.name: site.chain or record.plan.get(site.name) or Keep("not decomposed") for site in work.host.sites()})
    for name in restored:
        record.plan[name] = Keep("reconstructed")
    return _finished(work, record, name_of(Reconstruct()), target, cut=False, check=check)


def report_onnx(path: str | os.PathLike[str], *, example_inputs: Any = None) -> Report:
    """What was done to every layer in an ONNX file; "not decomposed" where nothing was.

    Args:
        path: the file.
        example_inputs: as for ``decompose_onnx``; by default MACs are those of the sizes that the file was cut with, if it was.
    """
    return _opened(path, example_inputs, {}, DEFAULT, check=False).report()


@dataclass(slots=True, kw_only=True, eq=False)
class _Work:
    """A file that surgery is done on."""

    source: Path
    model: ModelProto
    feed: Feed | None
    host: OnnxHost
    sites: tuple[Site, ...]
    shapes: Mapping[str, tuple[int, ...]]

    def feeds(self, calibration: Any) -> list[Feed]:
        """The batches of inputs that a user gave, if any."""
        if calibration is None:
            return []
        from surgery.onnx_files.calibrate import calibration_feeds

        need("onnxruntime", "calibration of an ONNX file", "export")
        return calibration_feeds(self.model, calibration)

    def _learn(self, feeds: Sequence[Feed], sites: Sequence[Site]) -> Calibration:
        """What these layers see of batches of inputs, and what the outputs make of theirs."""
        from surgery.onnx_files.calibrate import calibrate_file
        from surgery.onnx_files.weigh import weighed

        external = has_external_data(self.source)
        learnt = calibrate_file(self.model, feeds, sites, self.host.reads(), external=external)
        return weighed(learnt, self.model, self.host, sites, feeds, external=external)

    def correct(self, original: ModelProto, result: PassResult, feeds: Sequence[Feed]) -> dict[str, float]:
        """Correct the chains that a cut has made; errors of their outputs, by name. Nothing is done where there are no batches of inputs."""
        if not feeds:
            return {}
        from surgery.onnx_files.correct import correct_file

        cut = [outcome.site for outcome in result.outcomes if outcome.status == "applied"]
        return correct_file(original, self.host, cut, feeds, external=has_external_data(self.source))

    def draft(self, ranks: Ranks, options: Options, feeds: Sequence[Feed]) -> Draft:
        totals = Totals(params=_params(self.model), macs=self.macs())
        return Draft(self.sites, ranks, options, totals, learn=partial(self._learn, feeds) if feeds else None)

    def macs(self) -> int | None:
        return network_macs(self.model, self.shapes) if self.shapes else None

    def report(self) -> Report:
        """Of what the file is now."""
        self.shapes = _shapes(self.model, self.feed, self.source)
        record = read_file_record(self.model)
        sites, macs = OnnxHost(self.model, self.shapes).sites(), self.macs()
        before = None if macs is None else macs + sum(saved_macs(site) or 0 for site in sites)
        return report_of(sites, record.sites(), params=_params(self.model), macs=before, passes=record.passes, calibrated=record.calibrated)


def _opened(path: str | os.PathLike[str], example_inputs: Any, ranks: Ranks, options: Options, *, check: bool) -> _Work:
    request = parse_ranks(ranks)
    if (isinstance(request, Budget) and request.latency is not None) or runtime_of(options.guard) is not None:
        raise SurgeryValueError("time is not measured on ONNX files: take Budget(macs=...) or guard='macs', and compare the files' times afterwards")
    if check:
        need("onnxruntime", "the check of an ONNX file", "export")
    model = open_model(path)
    feed, can_run = None, takes_numbers(model)
    if check or example_inputs is not None or can_run:  # else nothing is run
        feed = example_feed(model, example_inputs, read_file_record(model).shapes)
    sizes = shapes_of_feed(feed)
    shapes = _shapes(model, feed, Path(path))
    asks = f"give example_inputs: the file leaves open the sizes of {open_inputs(model)}"
    if not can_run:
        asks = "nothing can be run, as an input is of a type that torch has not"
    if isinstance(request, Budget) and request.macs is not None and network_macs(model, shapes) is None:
        unknown = ", ".join(unknown_values(model, shapes)[:5])
        raise SurgeryValueError(f"ranks: {request} needs to know MACs; {f'the shapes of {unknown} could not be found' if sizes else asks}")
    if check and feed is None:
        raise SurgeryValueError(f"the check needs inputs to run; {asks}, or write it unchecked with check=False")
    host = OnnxHost(model, shapes)
    return _Work(source=Path(path), model=model, feed=feed, host=host, sites=host.sites(), shapes=shapes)


def _shapes(model: ModelProto, feed: Feed | None, source: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the values in a model for these inputs: inferred, and measured where that leaves some open."""
    if feed is None:
        return {}
    shapes = value_shapes(model, shapes_of_feed(feed))
    unknown = unknown_values(model, shapes)
    if unknown and find_spec("onnxruntime") is not None:
        with suppress(SurgeryError), watched(model, unknown, external=has_external_data(source)) as run:
            shapes |= {name: tuple(value.shape) for name, value in run(feed).items() if name in unknown}
    return shapes


def _finished(work: _Work, record: FileRecord, ran: str | None, target: Path, *, cut: bool, check: bool) -> OnnxResult:
    """Note what was done, write the file, prove it, and put it in its place."""
    if ran is not None:
        record.passes = (*record.passes, ran)
    record.shapes = shapes_of_feed(work.feed) or None
    write_plan(work.model, record)
    report = work.report()
    write_report(work.model, report)
    external = has_external_data(work.source)
    rounding: float | None = None
    difference: float | None = None
    with installed(target) as file:
        merged = merged_copy(work.model) if check and cut else None
        write_model(work.model, file, external=external, data=_data_name(work.source, target))
        if check and work.feed is not None:
            rounding, difference = prove(file, merged, work.source, work.feed, external=external)
        size = sum(p.stat().st_size for p in file.parent.iterdir())
    return OnnxResult(path=str(target), report=report, rounding=rounding, difference=difference, size_bytes=size)


def _forget_output_errors(record: FileRecord, result: PassResult) -> list[str]:
    """What was measured of chains that are others now, or none any more, no longer holds; their names."""
    changed = [outcome.site for outcome in result.outcomes if outcome.status == "applied"]
    for name in changed:
        record.output_errors.pop(name, None)
    return changed


def _data_name(source: Path, target: Path) -> str:
    """A name for the weights beside the target that is not one of the files in which the source keeps its own."""
    kept = set() if target.exists() and target.samefile(source) else data_files(source)
    place = target.resolve()
    names = chain([f"{place.name}.data"], (f"{place.name}.{number}.data" for number in count(1)))
    return next(name for name in names if (place.parent / name).resolve() not in kept)


def _params(model: ModelProto) -> int:
    """Floating-point numbers that the main graph holds."""
    graph = Graph(model)
    constants = [c.tensor for node in graph.nodes if node.op_type == "Constant" and isinstance(c := graph.constant(node.output[0]), Constant)]
    tensors = [*graph.initializers.values(), *constants]
    return sum(prod(t.dims) for t in tensors if (dtype := tensor_dtype(t.data_type)) is not None and dtype.is_floating_point)
