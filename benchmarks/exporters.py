"""Which exporter writes which network, how exactly, how fast, and how large is the file?

    python benchmarks/exporters.py [--only REGEX] [--resume]
    python benchmarks/exporters.py --cost

Of every module of torchvision's models the network with the fewest parameters (detectors only where its compiled operators load), and ``NAMES`` of
the other libraries of ``coverage.py``, with random weights in float32 on small inputs; each as it is and with every layer at half rank
(``{"re:.*": 0.5}``). Every exporter is asked for as much as the network itself takes: an open batch, and for the cut network open sizes as well;
where it refuses, for less, and the reason is kept. A file counts when it agrees with the network (``surgery/export``); ONNX files are also held
against the plan, convolution for convolution.

Every network runs in a process of its own on one thread; seconds are those of the processor, so that other work on the machine does not count, and
include the check. ``--cost`` times both exporters to ONNX alone, in turn and without the check, on ``COSTED``. Results: ``results/exporters.json``
and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import coverage_models
import torch
from coverage import in_a_process, installed, listed, one_line, read_rows
from coverage_check import find_inputs
from torch import nn

import surgery
from passes import host_for
from passes.kinds import kind_of
from passes.running import kept_random_states, quietly, run
from surgery.benchmark import environment
from surgery.export import onnx_convolutions
from surgery.zoo.torchvision_ops import import_torchvision

RESULTS = Path(__file__).parent / "results" / "exporters.json"
NAMES = (
    "timm:convnext_atto",
    "timm:efficientformerv2_s0",
    "timm:ghostnet_050",
    "timm:hrnet_w18_small",
    "timm:levit_128s",
    "timm:res2net50_26w_4s",
    "timm:resnetv2_18",
    "transformers:ConvNextForImageClassification",
    "transformers:MobileViTForImageClassification",
    "transformers:UperNetForSemanticSegmentation",
    "transformers:DetrForObjectDetection",
    "transformers:CLIPModel",
    "transformers:Wav2Vec2ForCTC",
    "diffusers:UNet2DConditionModel",
    "diffusers:AutoencoderKL",
    "diffusers:ControlNetModel",
    "ultralytics:yolov8n",
    "ultralytics:yolo11n-seg",
    "segmentation_models_pytorch:FPN-resnet18",
    "segmentation_models_pytorch:DeepLabV3Plus-resnet18",
    "monai:UNet 3d",
    "monai:BasicUNet",
    "monai:DynUNet",
    "monai:DiffusionModelUNet",
    "monai:SwinUNETR",
)
COSTED = ("torchvision:resnet18", "torchvision:resnet50", "torchvision:vgg11", "torchvision:densenet121", "torchvision:mobilenet_v2")
ROUNDS = 3
KERNELS = import_torchvision().extension._has_ops()
"""Whether torchvision's compiled operators load."""
Row = dict[str, Any]
EXPORTERS: dict[str, tuple[str, Callable[..., surgery.ExportReport]]] = {
    "onnx, dynamo": ("net.onnx", partial(surgery.export_onnx, exporter="dynamo")),
    "onnx, torchscript": ("net.onnx", partial(surgery.export_onnx, exporter="torchscript")),
    "torchscript": ("net.pt", surgery.export_torchscript),
    "program": ("net.pt2", surgery.export_program),
    "openvino": ("net.xml", partial(surgery.export_openvino, exporter="auto")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="networks whose name has a match; rows of others stay")
    parser.add_argument("--resume", action="store_true", help="leave out networks that have a row in the working folder")
    parser.add_argument("--cost", action="store_true", help="time both exporters to ONNX, in turn, and nothing else")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "surgery-exporters", help="working folder")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--timeout", type=int, default=3600, help="seconds for one network")
    parser.add_argument("--memory", type=float, default=20, help="gigabytes for one network")
    parser.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        print(json.dumps(check(options.one)))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    costs = options.work / "costs.json"
    if options.cost:
        costs.write_text(json.dumps([cost(name) for name in COSTED]))
    file = options.work / "rows.jsonl"
    rows = read_rows(file)
    names = [] if options.cost else [name for name in chosen(options.work) if re.search(options.only, name)]
    for name in names:
        if options.resume and name in rows:
            continue
        rows[name] = in_a_process(name, options.timeout, options.memory, __file__)
        with file.open("a") as lines:
            lines.write(json.dumps(rows[name]) + "\n")
        print(line(rows[name]), flush=True)
    publish(list(rows.values()), json.loads(costs.read_text()) if costs.exists() else [], options.out)


def chosen(work: Path) -> list[str]:
    """Names of the networks, of the libraries that are installed."""
    from torchvision import models

    smallest: dict[str, tuple[int, str]] = {}
    for name, size in listed("torchvision", work):
        module = models.get_model_builder(name.partition(":")[2]).__module__
        if ".detection." in module and not KERNELS:  # what stands in for its operators here is no operator to an exporter
            continue
        smallest[module] = min(smallest.get(module, (size, name)), (size, name))
    others = [name for name in NAMES if installed(name.partition(":")[0]) is not None]
    return [name for _, name in sorted(smallest.values())] + others


def check(name: str) -> Row:
    """Everything about one network."""
    network = coverage_models.network_named(name)
    torch.manual_seed(0)
    model = network.make().eval()
    given, batch, _ = find_inputs(model, network.given)
    inputs = given.inputs(batch)
    row: Row = {"name": name, "library": network.library, "parameters": sum(p.numel() for p in model.parameters())}
    row |= {"given": given.text, "batch": batch, "failures": []}
    half = surgery.decompose(model, {"re:.*": 0.5})
    row["networks"] = {"plain": exports(model, inputs, ()), "half rank": exports(half, inputs, ("dynamic_size",))}
    return row


def exports(model: nn.Module, inputs: Any, beyond: Sequence[str]) -> dict[str, Row]:
    """Each exporter's results on one network, by exporter."""
    expected = planned(model, inputs)
    found = {}
    for exporter, (name, export) in EXPORTERS.items():
        refusals: list[str] = []
        for asked in (*(("dynamic_batch", *beyond[:n]) for n in range(len(beyond), -1, -1)), ()):
            with tempfile.TemporaryDirectory() as folder:
                found[exporter] = attempt(model, partial(export, model, Path(folder) / name, inputs, **dict.fromkeys(asked, True)), expected)
            if "difference" in found[exporter]:
                break
            refusals.append(f"{' and '.join(asked) or 'nothing open'}: {found[exporter]['error']}")
        found[exporter]["refusals"] = refusals
    return found


def attempt(model: nn.Module, export: Callable[[], surgery.ExportReport], expected: Counter[tuple[str, tuple[int, ...]]]) -> Row:
    began = time.process_time()
    try:
        report = export()
    except Exception as error:  # a library's own error would be a defect of ours, and belongs into the table too
        return {"error": f"{type(error).__name__}: {one_line(str(error))[:600]}", "seconds": time.process_time() - began}
    row: Row = {"difference": report.difference, "seconds": time.process_time() - began, "bytes": report.size_bytes}
    row |= {"inputs": report.inputs, "exporter": report.exporter}
    if report.format == "onnx":
        got = Counter((c.layer, c.weight_shape) for c in onnx_convolutions(report.path) if c.layer)
        row["convolutions"] = {"expected": sum(expected.values()), "absent": texts(expected - got), "odd": texts(got - expected)}
    return row


def planned(model: nn.Module, inputs: Any) -> Counter[tuple[str, tuple[int, ...]]]:
    """Every convolution call that the plan foresees, with its weight's shape: a chain's by its factorization, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for site in host_for(model).sites():
        if site.chain is None:
            shapes[site.name] = site.geometry.weight_shape
        else:
            for piece in kind_of(site.chain).shapes(site.geometry, site.chain, site.bias is not None):
                shapes[f"{site.name}.{piece.name}" if site.name else piece.name] = piece.geometry.weight_shape
    calls: Counter[str] = Counter()
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.conv._ConvNd)
    ]
    with kept_random_states():
        quietly(lambda: run(model, inputs))
    for handle in handles:
        handle.remove()
    return Counter({(name, shapes.get(name, ())): count for name, count in calls.items()})


def texts(counter: Counter[tuple[str, tuple[int, ...]]]) -> list[str]:
    return [f"{name} {shape}" + (f" x {count}" if count > 1 else "") for (name, shape), count in counter.items()]


def cost(name: str) -> Row:
    """Processor seconds of both exporters to ONNX, in turn, without the check; the first round is warm-up."""
    model, inputs = coverage_models.network_named(name).make().eval(), torch.randn(2, 3, 224, 224)
    seconds: dict[str, list[float]] = {"dynamo": [], "torchscript": []}
    for _ in range(ROUNDS + 1):
        for exporter, times in seconds.items():
            with tempfile.TemporaryDirectory() as folder:
                began = time.process_time()
                surgery.export_onnx(model, Path(folder) / "net.onnx", inputs, dynamic_batch=True, check=False, exporter=exporter)
                times.append(time.process_time() - began)
    ratios = [a / b for a, b in zip(seconds["dynamo"][1:], seconds["torchscript"][1:], strict=True)]
    print(name, seconds, flush=True)
    return {
        "name": name,
        "seconds": {key: statistics.median(times[1:]) for key, times in seconds.items()},
        "first": {key: times[0] for key, times in seconds.items()},
        "ratio": [min(ratios), statistics.median(ratios), max(ratios)],
    }


def publish(rows: Sequence[Row], costs: Sequence[Row], out: Path) -> None:
    """Write results and table."""
    rows = sorted(rows, key=lambda row: (list(coverage_models.LIBRARIES).index(row["library"]), row["name"]))
    facts = environment(["onnxruntime", "openvino"]) | {name: v for name in coverage_models.LIBRARIES if (v := installed(name)) is not None}
    facts["onnxscript"] = installed("onnxscript") or "-"
    found = {"command": "python benchmarks/exporters.py", "environment": facts, "threads": 1, "costs": list(costs), "rows": list(rows)}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    words = ", ".join(f"{key} {value}" for key, value in facts.items())
    parts = ["# Exporters", INTRODUCTION, *summary(rows), *cost_table(costs), *table(rows), f"Made by `python benchmarks/exporters.py` with {words}."]
    out.with_suffix(".md").write_text("\n\n".join(parts) + "\n")


INTRODUCTION = """\
Random weights in float32, small inputs, each network as it is and with every layer at half rank. A file counts when it agrees with the network on
fresh inputs (max |a - b| / max |b| at most 1e-4), on two sizes of whatever is open. Seconds are of one processor core and include that check. What is
open: B the batch, S sizes (the plain networks are asked for the batch only). What exactly is done: `benchmarks/exporters.py`. A difference of exactly
0 in all of them is a network whose random weights say the same of every input (GoogLeNet): its rows show only that files are written and run."""


def results(rows: Sequence[Row]) -> Iterator[tuple[Row, str, str, Row]]:
    for row in rows:
        for network, by_exporter in row.get("networks", {}).items():
            for exporter, result in by_exporter.items():
                yield row, network, exporter, result


def summary(rows: Sequence[Row]) -> Iterator[str]:
    heads = ["exporter", "files", "of", "batch open", "sizes open (half rank)", "largest difference", "median s", "s in all", "plan's convolutions"]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for exporter in EXPORTERS:
        group = [(network, result) for _, network, name, result in results(rows) if name == exporter]
        done = [(network, result) for network, result in group if "difference" in result]
        seconds = [result["seconds"] for _, result in done]
        exact = [not (result["convolutions"]["absent"] or result["convolutions"]["odd"]) for _, result in done if "convolutions" in result]
        cells = (
            exporter,
            len(done),
            len(group),
            sum("B" in opened(result) for _, result in done),
            f"{sum('S' in opened(r) for n, r in done if n == 'half rank')} of {sum(n == 'half rank' for n, _ in group)}",
            f"{max((r['difference'] for _, r in done), default=0):.1e}",
            f"{statistics.median(seconds):.1f}" if seconds else "-",
            f"{sum(seconds):.0f}",
            f"{sum(exact)} of {len(exact)}" if exact else "-",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    yield "\n".join(lines)


def cost_table(costs: Sequence[Row]) -> Iterator[str]:
    if not costs:
        return
    lines = ["| network, batch open, 224 px | dynamo, s | torchscript, s | dynamo / torchscript |", "|---|---:|---:|---:|"]
    for row in costs:
        low, middle, high = row["ratio"]
        times = row["seconds"]
        lines.append(f"| {row['name']} | {times['dynamo']:.1f} | {times['torchscript']:.1f} | {middle:.1f} ({low:.1f} to {high:.1f}) |")
    yield "## What the two exporters to ONNX cost\n\nProcessor seconds of `export_onnx(check=False)`, in turn, medians of three after a warm-up."
    yield "\n".join(lines)


def opened(result: Row) -> str:
    """B where a batch is open, S where sizes are."""
    text = " ".join(result.get("inputs", ()))
    return ("B" if "batch" in text else "") + ("S" if re.search("height|width|length|depth|size_", text) else "")


def table(rows: Sequence[Row]) -> Iterator[str]:
    lines = ["| network | inputs | | " + " | ".join(EXPORTERS) + " |", "|---|---|---" + "|---:" * len(EXPORTERS) + "|"]
    reasons: dict[str, int] = {}
    for row in rows:
        for network, by_exporter in row.get("networks", {}).items():
            cells = [row["name"], f"{row['given']}, batch {row['batch']}", network]
            for result in by_exporter.values():
                note = ""
                if result["refusals"]:
                    text = f"{row['name']}, {'; then with '.join(f'{refusal[:300]}' for refusal in result['refusals'])}"
                    note = f" [{reasons.setdefault(text, len(reasons) + 1)}]"
                if "difference" in result:
                    cells.append(f"{result['difference']:.0e}, {result['seconds']:.1f} s, {size(result['bytes'])} {opened(result) or '-'}{note}")
                else:
                    cells.append(f"**no**{note}")
            lines.append("| " + " | ".join(cells) + " |")
    yield "## Networks\n\nEach cell: largest difference, seconds, size of the file, what is open; a number names a refusal below.\n"
    yield "\n".join(lines)
    failures = [f"- {row['name']}: {one_line(failure)}" for row in rows for failure in row["failures"]]
    odd = [
        f"- {row['name']}, {network}, {exporter}: absent {', '.join(c['absent']) or 'none'}; in addition {', '.join(c['odd']) or 'none'}"
        for row, network, exporter, result in results(rows)
        if (c := result.get("convolutions")) and (c["absent"] or c["odd"])
    ]
    yield "## What was refused, and why\n\n" + ("\n".join(f"{number}. {text}" for text, number in reasons.items()) or "Nothing.")
    yield "## Convolution calls that are not in the graph one to one\n\n" + ("\n".join(odd) or "None.")
    if failures:
        yield "## Networks that could not be tried\n\n" + "\n".join(failures)


def size(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def line(row: Row) -> str:
    done = sum("difference" in result for *_, result in results([row]))
    return one_line(f"{row['name']}: {done} of {sum(1 for _ in results([row]))} " + "; ".join(row["failures"]))[:400]


if __name__ == "__main__":
    main()
