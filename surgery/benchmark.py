"""Is it really faster? Two networks timed in turn on the same inputs, FLOPs beside time."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from passes.errors import SurgeryValueError
from passes.parity import tensors_in
from passes.running import kept_random_states, private_copy, run
from surgery.cost import count_macs, threads_set
from surgery.inspection import usable_model

__all__ = ["RUNTIMES", "Benchmark", "RuntimeResult", "benchmark"]

FORMAT = "surgery.benchmark"
VERSION = 1
SAMPLE_SECONDS = 0.005  # a sample repeats the network until it takes at least this long
WARM_UP = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeResult:
    """Times on one runtime. Ratios are before / after of neighbouring samples: the median, and the quartiles around it.

    ``verdict`` is "faster" or "slower" only where both quartiles are on that side of 1, else "no difference".
    """

    runtime: str
    before_ms: float
    after_ms: float
    time_ratio: float
    time_ratio_low: float
    time_ratio_high: float
    verdict: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """Result of ``benchmark``: a row a runtime, MACs of one forward pass of both networks, and the environment."""

    rows: tuple[RuntimeResult, ...]
    macs_before: int
    macs_after: int
    repeats: int
    threads: int
    input_shapes: tuple[tuple[int, ...], ...]
    environment: dict[str, str]

    @property
    def flops_ratio(self) -> float | None:
        """FLOPs (twice the MACs) before over after."""
        return self.macs_before / self.macs_after if self.macs_after else None

    def to_data(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION} | asdict(self) | {"flops_ratio": self.flops_ratio}

    def to_json(self) -> str:
        return json.dumps(self.to_data(), indent=1, ensure_ascii=False) + "\n"

    def __str__(self) -> str:
        from surgery.tables import benchmark_table, render

        return render(benchmark_table(self))


@kept_random_states()
def benchmark(
    before: nn.Module,
    after: nn.Module,
    example_inputs: Any,
    *,
    runtimes: Sequence[str] = ("eager", "onnxruntime"),
    repeats: int = 30,
    threads: int | None = None,
) -> Benchmark:
    """Time two networks in turn on the same inputs, in eval mode.

    Samples alternate (before, after, after, before, ...), after a warm-up, so that other work on the machine falls on both alike; each pair of
    neighbouring samples gives one ratio.

    Args:
        before: the original network.
        after: the decomposed one.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        runtimes: ``"eager"`` (torch as it is), ``"compile"`` (``torch.compile``), ``"onnxruntime"`` and ``"openvino"`` (both on the CPU),
            ``"train"`` (a training step in eager mode, forward and backward, without the optimizer's).
        repeats: pairs of samples a runtime.
        threads: for both networks; torch's current number where None.

    Raises:
        SurgeryValueError: an unknown runtime, or fewer than 4 repeats.
        MissingExtra: a runtime is not installed.
    """
    for model in (before, after):
        usable_model(model)
    for name in runtimes:
        if name not in RUNTIMES:
            raise SurgeryValueError(f"runtimes: {name!r} is none of {list(RUNTIMES)}")
    if not isinstance(repeats, int) or repeats < 4:
        raise SurgeryValueError(f"repeats: at least 4 pairs are needed for a median with quartiles, got {repeats!r}")
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise SurgeryValueError(f"threads: expected a number of at least 1, got {threads!r}")
    networks = [private_copy(model, share_parameters=True).eval() for model in (before, after)]
    with threads_set(threads), torch.no_grad():
        macs = [_macs(network, example_inputs) for network in networks]
        rows = tuple(_time(name, networks, example_inputs, repeats) for name in runtimes)
        used = torch.get_num_threads()
    return Benchmark(
        rows=rows,
        macs_before=macs[0],
        macs_after=macs[1],
        repeats=repeats,
        threads=used,
        input_shapes=tuple(tuple(t.shape) for t in tensors_in(example_inputs)),
        environment=environment(runtimes),
    )


def environment(runtimes: Sequence[str] = ()) -> dict[str, str]:
    """What a time depends on: versions, processor, device."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": _processor(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    for name in ("onnxruntime", "openvino"):
        if name in runtimes:
            found[name] = import_module(name).__version__
    if torch.cuda.is_available():
        found["cuda_device"] = torch.cuda.get_device_name()
    return found


@contextmanager
def _eager(network: nn.Module, example_inputs: Any) -> Iterator[Callable[[], object]]:
    on_cuda = any(t.is_cuda for t in tensors_in(example_inputs))

    def call() -> object:
        output = run(network, example_inputs)
        if on_cuda:
            torch.cuda.synchronize()
        return output

    yield call


@contextmanager
def _train(network: nn.Module, example_inputs: Any) -> Iterator[Callable[[], object]]:
    """Forward in train mode, and backward from all floating-point outputs to all parameters. Nothing is accumulated in ``grad``."""
    network.train()
    wanted = [p for p in network.parameters() if p.requires_grad]
    on_cuda = any(t.is_cuda for t in tensors_in(example_inputs))

    def call() -> object:
        with torch.enable_grad():
            reached = [t for t in tensors_in(run(network, example_inputs)) if t.requires_grad]
            found = torch.autograd.grad(reached, wanted, [torch.ones_like(t) for t in reached], allow_unused=True) if reached and wanted else ()
        if on_cuda:
            torch.cuda.synchronize()
        return found

    yield call


@contextmanager
def _compile(network: nn.Module, example_inputs: Any) -> Iterator[Callable[[], object]]:
    with _eager(torch.compile(network, dynamic=False), example_inputs) as call:  # type: ignore[arg-type]
        yield call


@contextmanager
def _onnxruntime(network: nn.Module, example_inputs: Any) -> Iterator[Callable[[], object]]:
    from surgery.export.onnx import export_onnx, onnx_session, run_session

    with TemporaryDirectory() as folder:
        file = Path(folder) / "network.onnx"
        export_onnx(network, file, example_inputs, check=False)
        session = onnx_session(file, torch.get_num_threads())
        yield lambda: run_session(session, example_inputs)


@contextmanager
def _openvino(network: nn.Module, example_inputs: Any) -> Iterator[Callable[[], object]]:
    from surgery.cost.timing import need
    from surgery.export.onnx import export_onnx

    need("openvino")
    with TemporaryDirectory() as folder:
        file = Path(folder) / "network.onnx"
        export_onnx(network, file, example_inputs, check=False)
        yield openvino_call(file, example_inputs)


def openvino_call(file: Path, example_inputs: Any) -> Callable[[], object]:
    """Calls of an ONNX file in OpenVINO on the CPU, with torch's number of threads."""
    import openvino

    compiled = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_NUM_THREADS": torch.get_num_threads()})
    request = compiled.create_infer_request()
    feed = {index: t.detach().cpu().numpy() for index, t in enumerate(tensors_in(example_inputs))}
    return lambda: request.infer(feed)


RUNTIMES = {"eager": _eager, "onnxruntime": _onnxruntime, "openvino": _openvino, "compile": _compile, "train": _train}


def _time(runtime: str, networks: Sequence[nn.Module], example_inputs: Any, repeats: int) -> RuntimeResult:
    prepare = RUNTIMES[runtime]
    with prepare(networks[0], example_inputs) as before, prepare(networks[1], example_inputs) as after:
        return compare(runtime, before, after, repeats)


def compare(runtime: str, before: Callable[[], object], after: Callable[[], object], repeats: int) -> RuntimeResult:
    """Times of two calls in turn, so many pairs of samples."""
    import statistics

    calls = (before, after)
    loops = max(_loops(call) for call in calls)
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats):
        order = (0, 1) if repeat % 2 == 0 else (1, 0)
        for which in order:
            times[which].append(_sample(calls[which], loops))
    ratios = [b / a for b, a in zip(*times, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return RuntimeResult(
        runtime=runtime,
        before_ms=1e3 * statistics.median(times[0]),
        after_ms=1e3 * statistics.median(times[1]),
        time_ratio=middle,
        time_ratio_low=low,
        time_ratio_high=high,
        verdict="faster" if low > 1 else "slower" if high < 1 else "no difference",
    )


def _loops(call: Callable[[], object]) -> int:
    for _ in range(WARM_UP):
        call()
    return max(1, round(SAMPLE_SECONDS / max(_sample(call, 1), 1e-9)))


def _sample(call: Callable[[], object], loops: int) -> float:
    began = time.perf_counter()
    for _ in range(loops):
        call()
    return (time.perf_counter() - began) / loops


def _macs(network: nn.Module, example_inputs: Any) -> int:
    with count_macs() as counter:
        run(network, example_inputs)
    return counter.macs


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
