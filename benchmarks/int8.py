"""What shippers do next: integers on top of a cut network, accuracy and time.

    python benchmarks/int8.py --data ROOT --cifar FOLDER [--only NAME ...] [--threads N] [--table]

Networks trained on CIFAR-10 (``bundled`` is the ResNet-20 that comes with surgery, ROOT holds the others in ``weights/``) as they are and cut to a
share of their MACs, calibrated on 1,024 training images; each in float32 and after static post-training quantization by onnxruntime (weights a
channel, activations a tensor, ranges from the same images; seven bits for weights where the processor adds products of bytes up in 16 bits, as it
saturates there). Both kinds of files run in onnxruntime and in OpenVINO, which reads the quantization from the file as well. Top-1 is on all 10,000
test images, time at batch 1 against the uncut float32 network, in turn.

A row is appended to ``benchmarks/results/int8.jsonl`` when it is done, and one that is there is not measured again; the table is ``int8.md``. Let
nothing else run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cifar10
import torch
from accuracy_cases import IMAGES, cifar_case
from latency import append, read
from onnxruntime import quantization
from torch import Tensor, nn

import surgery
from surgery.benchmark import environment
from surgery.benchmarking.result import NO_VERDICT
from surgery.export.onnx import onnx_session, run_session
from surgery.zoo import make

RESULTS = Path(__file__).parent / "results" / "int8.jsonl"
NETWORKS = ("bundled", "resnet20", "resnet56")
SHARES = (1.0, 0.7, 0.5)
NUMBERS = ("float32", "int8")
KEY = ("network", "share", "numbers", "runtime", "threads")
BATCH = 100


@dataclass(frozen=True, slots=True)
class Task:
    """A trained network, the images that calibrate it (N, 3, 32, 32), and those it is measured on."""

    model: nn.Module
    calibration: list[Tensor]
    images: Tensor
    labels: Tensor


def task_of(name: str, options: argparse.Namespace) -> Task:
    images, labels = (t[: options.images] for t in cifar10.read(options.cifar, cifar10.TEST_FILES))
    if name != "bundled":
        case = cifar_case(name, options.data, options.cifar, False)
        return Task(case.model, case.draws[0], images, labels)
    train, _ = cifar10.read(options.cifar, ("data_batch_1",))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    return Task(make("surgery:resnet20")[0], list(train[order[:IMAGES]].split(128)), images, labels)


class Images(quantization.CalibrationDataReader):  # type: ignore[misc]
    """Gives the calibration images to onnxruntime batch by batch."""

    def __init__(self, name: str, batches: list[Tensor]) -> None:
        self._feeds: Iterator[dict[str, Any]] = ({name: batch.numpy()} for batch in batches)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


def write(task: Task, share: float, folder: Path) -> dict[str, Path]:
    """The network, cut to a share of its MACs, as a float32 and an int8 file."""
    example = task.images[:1]
    net = task.model
    if share < 1:
        net = surgery.decompose(net, surgery.Budget(macs=share), example_inputs=example, calibration=task.calibration, round_to=8)
    files = {numbers: folder / f"{share}-{numbers}.onnx" for numbers in NUMBERS}
    surgery.export_onnx(net, files["float32"], example, dynamic_batch=True, check=False)
    quantize(files["float32"], files["int8"], task.calibration)
    return files


def quantize(file: Path, target: Path, batches: list[Tensor]) -> None:
    """Static post-training quantization: quantize and dequantize nodes around what is done in integers."""
    from surgery.benchmarking.files import file_inputs

    prepared = target.with_suffix(".prepared.onnx")
    quantization.quant_pre_process(str(file), str(prepared), skip_symbolic_shape=True)
    quantization.quantize_static(
        str(prepared),
        str(target),
        Images(file_inputs(file)[0].name, batches),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        reduce_range=not adds_in_32_bits(),
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )


def adds_in_32_bits() -> bool:
    """Whether the processor has instructions (VNNI, or Arm's) that add products of bytes up in 32 bits."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else []
    return any(flag in flags for flag in ("avx512_vnni", "avx_vnni", "asimddp"))


def top1(file: Path, runtime: str, images: Tensor, labels: Tensor, threads: int) -> float:
    """In percent."""
    call = _caller(file, runtime, threads)
    hits = sum(int((call(x).argmax(1) == y).sum()) for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True))
    return 100 * hits / len(labels)


def _caller(file: Path, runtime: str, threads: int) -> Callable[[Tensor], Tensor]:
    if runtime == "onnxruntime":
        session = onnx_session(file, threads)
        return lambda x: run_session(session, x)[0]
    import openvino

    compiled = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: torch.from_numpy(compiled(x.numpy())[0])


def rows(name: str, wanted: list[tuple[Any, ...]], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of one network; every file is written once."""
    task = task_of(name, options)
    with TemporaryDirectory() as folder:
        made = {1.0: write(task, 1.0, Path(folder))}
        original = made[1.0]["float32"]
        for key in wanted:
            _, share, numbers, runtime, threads = key
            files = made[share] = made[share] if share in made else write(task, share, Path(folder))
            row = dict(zip(KEY, key, strict=True)) | {"load_average": os.getloadavg()[0], "environment": environment([runtime])}
            row |= {"adds_in_32_bits": adds_in_32_bits(), "measured_examples": len(task.images)}
            row |= {"top1": top1(files[numbers], runtime, task.images, task.labels, threads)}
            sampling = {"runtimes": [runtime], "threads": threads, "precision": options.precision, "seconds": options.seconds}
            yield row | surgery.benchmark(original, files[numbers], task.images[:1], **sampling).rows[0].to_data()


def markdown(found: list[dict[str, Any]]) -> str:
    bits = " or ".join(dict.fromkeys("eight" if row["adds_in_32_bits"] else "seven" for row in found))
    lines = [
        "# Integers on top of a cut",
        "",
        "Times and sizes against the uncut float32 network in the same runtime, batch 1; ratios within 0.02 of 1 tell nothing. Activations",
        f"have eight bits, weights {bits}, as the processor's products of bytes need.",
    ]
    for runtime, threads in dict.fromkeys((row["runtime"], row["threads"]) for row in found):
        group = [row for row in found if (row["runtime"], row["threads"]) == (runtime, threads)]
        loads = [row["load_average"] for row in group]
        told = "; ".join(f"{name} {value}" for name, value in sorted(group[0]["environment"].items()))
        lines += ["", f"## {runtime}, {threads} {'thread' if threads == 1 else 'threads'}", "", told, ""]
        lines += [f"Load average when rows began: {min(loads):.1f} to {max(loads):.1f}.", ""]
        lines += ["| network | share of MACs | numbers | top-1 % | time ratio | verdict | file ratio |", "|---|---:|---|---:|---:|---|---:|"]
        for row in group:
            verdict = "none" if row["verdict"] == NO_VERDICT else row["verdict"]
            cells = [row["network"], str(row["share"]), row["numbers"], f"{row['top1']:.2f}", f"{row['time_ratio']:.2f} ± {row['spread']:.2f}"]
            cells += [verdict, f"{row['file_bytes_before'] / row['file_bytes_after']:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with weights/")
    parser.add_argument("--cifar", type=Path, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--runtimes", nargs="+", choices=("onnxruntime", "openvino"), help="default: those that are installed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", type=float, default=0.01, help="half the width of the ratio's interval, as a share of it")
    parser.add_argument("--seconds", type=float, default=15.0, help="of sampling, a row at most")
    parser.add_argument("--images", type=int, default=10_000, help="test images, the first so many")
    parser.add_argument("--table", action="store_true", help="make the table of the rows that are there, and measure nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not options.table and (options.cifar is None or (options.data is None and set(options.only) != {"bundled"})):
        parser.error("--cifar is needed to measure anything, and --data for all but the bundled network")
    runtimes = options.runtimes or [name for name in ("onnxruntime", "openvino") if importlib.util.find_spec(name) is not None]
    torch.set_num_threads(options.threads)
    done = {tuple(row[name] for name in KEY) for row in read(options.out)}
    for name in [] if options.table else options.only:
        every = [(name, share, numbers, runtime, options.threads) for share in SHARES for numbers in NUMBERS for runtime in runtimes]
        wanted = [key for key in every if key not in done]
        for row in rows(name, wanted, options) if wanted else ():
            append(row, options.out)
            print({name: row[name] for name in (*KEY, "top1", "time_ratio", "spread", "verdict")}, flush=True)
    options.out.with_suffix(".md").write_text(markdown(read(options.out)))


if __name__ == "__main__":
    main()
