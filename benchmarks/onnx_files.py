"""Real ONNX files in, ONNX files out: what is lost at full rank, what a budget gives, and is text still read the same?

    pip install --no-deps --target FOLDER rapidocr-onnxruntime ddddocr
    python benchmarks/onnx_files.py FOLDER [--only REGEX] [--again TASK]

Every .onnx file that the two packages ship (none is in this repository), on one thread:

- ``full``: every convolution that can be cut at full rank; the largest difference of the outputs in onnxruntime, on a rendered page, and on noise
  (where a detector of text says almost nothing, in numbers of the size of rounding).
- ``macs``: ``Budget(macs=0.6), method="auto"``; MACs of the convolutions in the written file by ``onnx.shape_inference``, against those of the file
  that was read, and its time in onnxruntime as a share of the original's, run in turn: median and quartiles over the pairs. Rows say how busy the
  machine was.
- ``text``: ``Budget(macs=0.9), method="auto"`` for the recognisers, with the weights alone, and with calibration on other rendered lines: how many of
  20 rendered lines of the kind that a network is made for (one reads captchas: letters without case, and digits) are read as before; and how many of
  200 more, half of them drawn from letters of both cases, whatever the network makes of them. How many the original reads right is said beside.

What is done is kept in ``results/onnx_files.json`` and not done again, unless ``--again`` names it; ``results/onnx_files.md`` is made from it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import string
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy
import onnx
import torch

import surgery
from surgery.benchmark import environment
from surgery.export.onnx import onnx_session
from surgery.files import write_atomically
from surgery.onnx_files.check import compare_files

RESULTS = Path(__file__).parent / "results"
SIZES = {  # what the packages run them with; the others declare their sizes
    "ch_PP-OCRv4_det_infer.onnx": (1, 3, 320, 320),
    "ch_PP-OCRv4_rec_infer.onnx": (1, 3, 48, 320),
    "ch_ppocr_mobile_v2.0_cls_infer.onnx": (1, 3, 48, 192),
    "common.onnx": (1, 1, 64, 256),
    "common_old.onnx": (1, 1, 64, 256),
}
READERS = {"ch_PP-OCRv4_rec_infer.onnx": (48, 3, 0.5, 0.5, ""), "common.onnx": (64, 1, 0.0, 1.0, "CHARSET_BETA")}
"""Height and channels of a line; what is taken from its grey values in [0, 1], and what they are then divided by; the list of letters."""
CAPTCHAS = {"common.onnx"}
ONE_CASE, BOTH_CASES = string.ascii_lowercase + string.digits, string.ascii_letters + string.digits
PAIRS = 30
PHRASES = [
    "Model surgery",
    "Total 1,284.50",
    "Invoice 20417",
    "open at nine",
    "Gate B12",
    "12 March 2024",
    "low rank",
    "Platform 9",
    "size 48x320",
    "fuse back",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the packages are installed")
    parser.add_argument("--only", default="", help="files whose names match")
    parser.add_argument("--again", choices=list(TASKS), action="append", default=[], help="do this again")
    parser.add_argument("--out", type=Path, default=RESULTS / "onnx_files.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    known: dict[str, Any] = json.loads(options.out.read_text())["files"] if options.out.exists() else {}
    for file in sorted(options.folder.rglob("*.onnx"), key=lambda f: f.stat().st_size):
        if not re.search(options.only, file.name):
            continue
        rows = known.setdefault(file.name, {"bytes": file.stat().st_size, "input": size_of(file)})
        for task, run in TASKS.items():
            if task in rows and task not in options.again:
                continue
            began = time.process_time()
            found = run(file)
            if found is None:
                continue
            rows[task] = found | {"seconds": round(time.process_time() - began, 1), "load": round(os.getloadavg()[0], 1)}
            print(file.name, task, json.dumps(rows[task])[:300], flush=True)
            data = {"environment": environment(["onnxruntime"]), "files": known}
            write_atomically(options.out, (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())
            write_atomically(options.out.with_suffix(".md"), table(data).encode())


def size_of(file: Path) -> list[int]:
    declared = onnx.load(file, load_external_data=False).graph.input[0].type.tensor_type.shape.dim
    return list(SIZES.get(file.name, [d.dim_value for d in declared]))


def example(file: Path) -> torch.Tensor:
    """A page of text of the size that the file takes."""
    from PIL import Image, ImageDraw

    _, channels, height, width = size_of(file)
    page = Image.new("L", (width, height), 255)
    for place, line in enumerate(PHRASES[: max(1, height // 48)]):
        ImageDraw.Draw(page).text((8, 4 + 48 * place), line, font=font(), fill=0)
    grey = torch.from_numpy(numpy.asarray(page, dtype=numpy.float32) / 127.5 - 1)
    return grey.expand(1, channels, height, width).clone()


def full_rank(file: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / file.name
        done = surgery.decompose_onnx(file, out, {"re:.*": 1.0}, example_inputs=example(file))
        name = onnx_session(file).get_inputs()[0].name
        difference = max(compare_files(out, file, [{name: example(file)}]))
    return {"difference": difference, "on_noise": done.difference, "rounding": done.rounding} | counts(done.report)


def at_macs(file: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / file.name
        try:
            done = surgery.decompose_onnx(file, out, surgery.Budget(macs=0.6), method="auto", example_inputs=example(file))
        except surgery.SurgeryValueError as error:
            return {"refused": str(error)} | counts(surgery.report_onnx(file, example_inputs=example(file)))
        before, after = convolution_macs(file, size_of(file)), convolution_macs(out, size_of(file))
        macs = {"convolution_macs_before": before, "convolution_macs_after": after, "convolution_macs_share": after / before}
        return macs | counts(done.report) | {"difference": done.difference, "bytes_after": done.size_bytes} | times(file, out)


def counts(report: surgery.Report) -> dict[str, Any]:
    cut = [row for row in report.layers if row.status == "decomposed"]
    kept: dict[str, int] = {}
    for row in report.layers:
        if row.status == "kept":
            reason = re.sub(r" \(groups=\d+\)", "", (row.reason or "").partition(":")[0])
            kept[reason] = kept.get(reason, 0) + 1
    return {"cut": len(cut), "layers": len(report.layers), "kept": kept, "macs_before": report.macs_before, "macs_after": report.macs_after}


def convolution_macs(file: Path, size: Sequence[int]) -> int:
    """By shape inference, from the shapes of outputs and weights alone; nothing of surgery is asked."""
    model = onnx.load(file)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    del dims[:]
    for n in size:
        dims.add(dim_value=n)
    del model.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    try:
        return summed_macs(model, inferred)
    except KeyError:  # sizes that the graph computes: onnxruntime's inference follows them
        from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

        return summed_macs(model, SymbolicShapeInference.infer_shapes(model, auto_merge=True))


def summed_macs(model: onnx.ModelProto, inferred: onnx.ModelProto) -> int:
    values = (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output)
    dims = {value.name: value.type.tensor_type.shape.dim for value in values}
    shapes = {name: [d.dim_value for d in sizes] for name, sizes in dims.items() if sizes and all(d.dim_value for d in sizes)}
    shapes |= {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    shapes |= {n.output[0]: list(a.t.dims) for n in model.graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"}
    total = 0
    for node in model.graph.node:
        if node.op_type in ("Conv", "ConvTranspose"):
            pixels = shapes[node.output[0] if node.op_type == "Conv" else node.input[0]]
            total += prod(shapes[node.input[1]]) * prod(pixels) // pixels[1]
    return total


def times(before: Path, after: Path) -> dict[str, Any]:
    """The time of the second file as a share of the first's, both run in turn on one thread."""
    sessions = [onnx_session(file, threads=1) for file in (before, after)]
    name, inputs = sessions[0].get_inputs()[0].name, example(before).numpy()

    def one(session: Any) -> float:
        began = time.perf_counter()
        session.run(None, {name: inputs})
        return time.perf_counter() - began

    for session in sessions * 2:
        one(session)
    pairs = [(one(sessions[0]), one(sessions[1])) for _ in range(PAIRS)]
    low, middle, high = statistics.quantiles([b / a for a, b in pairs], n=4)
    return {"time_share": middle, "time_share_quartiles": [low, high], "before_ms": 1e3 * statistics.median(a for a, _ in pairs), "pairs": PAIRS}


def text(file: Path) -> dict[str, Any] | None:
    if file.name not in READERS:
        return None
    lines = codes(20, seed=1, letters=ONE_CASE) if file.name in CAPTCHAS else PHRASES + codes(10, seed=1)
    more = codes(100, seed=101) + codes(100, seed=102, letters=ONE_CASE)
    others = [picture(file, line) for line in (*codes(100, seed=2), *(" ".join(codes(2, seed=seed)) for seed in range(3, 63)))]
    before = reads(file, file, lines + more)
    found: dict[str, Any] = {
        "lines": lines,
        "read_before": before[:20],
        "right_before": right(before[:20], lines),
        "right_of_more_before": right(before[20:], more),
    }
    budget: dict[str, Any] = {"ranks": surgery.Budget(macs=0.9), "method": "auto", "example_inputs": example(file)}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / file.name
        for how, calibration in zip(HOWS, (None, others), strict=True):
            done = surgery.decompose_onnx(file, out, calibration=calibration, **budget)
            after = reads(out, file, lines + more)
            ratio = convolution_macs(out, size_of(file)) / convolution_macs(file, size_of(file))
            found[how] = {"same": right(after[:20], before[:20]), "right": right(after[:20], lines), "read": after[:20]}
            found[how] |= {"same_of_more": right(after[20:], before[20:]), "right_of_more": right(after[20:], more)}
            found[how] |= {"convolution_macs_share": ratio, "difference": done.difference}
    return found


def right(read: Sequence[str], lines: Sequence[str]) -> int:
    """How many of the lines are read as they should be."""
    return sum(a == b for a, b in zip(read, lines, strict=True))


def codes(count: int, seed: int, letters: str = BOTH_CASES) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(letters, k=draw.randint(4, 8))) for _ in range(count)]


def picture(file: Path, line: str) -> numpy.ndarray:
    """A line of black text on white, (1, C, height, width), as this recogniser takes it."""
    from PIL import Image, ImageDraw

    height, channels, mean, spread, _ = READERS[file.name]
    left, _, right, _ = font().getbbox(line)
    image = Image.new("L", (ceil(right - left) + 24, 52), 255)
    ImageDraw.Draw(image).text((12 - left, 4), line, font=font(), fill=0)
    image = image.resize((round(image.width * height / image.height), height), Image.Resampling.BILINEAR)
    grey = (numpy.asarray(image, dtype=numpy.float32) / 255 - mean) / spread
    return numpy.repeat(grey[None, None], channels, axis=1)


def font() -> Any:
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), 36)


def reads(path: Path, original: Path, lines: Sequence[str]) -> list[str]:
    """What a recogniser reads in each line: the best class at each step, repetitions and blanks dropped."""
    session = onnx_session(path, threads=1)
    name, letters, found = session.get_inputs()[0].name, alphabet(original), []
    for line in lines:
        (scores,) = session.run(None, {name: picture(original, line)})
        steps = scores.reshape(-1, scores.shape[-1]).argmax(1)
        kept = [step for before, step in zip([-1, *steps], steps, strict=False) if step != before and step != 0]
        found.append("".join(letters[step] for step in kept))
    return found


def alphabet(file: Path) -> list[str]:
    """The letters of a recogniser's classes, the blank first: in its metadata, or in the module beside it."""
    written = {entry.key: entry.value for entry in onnx.load(file, load_external_data=False).metadata_props}
    if "character" in written:
        return ["", *written["character"].splitlines(), " "]
    scope: dict[str, Any] = {}
    exec((file.parent / "charsets.py").read_text(), scope)
    return list(scope[READERS[file.name][-1]])


TASKS: dict[str, Callable[[Path], dict[str, Any] | None]] = {"full": full_rank, "macs": at_macs, "text": text}


def table(data: dict[str, Any]) -> str:
    lines = ["# Real ONNX files in and out", ""]
    lines += ["Made by `benchmarks/onnx_files.py`, which says what is measured. Files of the packages rapidocr-onnxruntime and ddddocr.", ""]
    heads = [
        "file",
        "input",
        "layers cut at full rank",
        "difference (on noise)",
        "convolution MACs left at `macs=0.6`",
        "time after / before (quartiles), load",
        "20 lines read as before at `macs=0.9`",
        "of 200 more, half of them drawn from both cases",
    ]
    lines += [f"| {' | '.join(heads)} |"]
    lines += ["|" + "---|" * len(heads)]
    for name, rows in data["files"].items():
        cells = [name, "x".join(map(str, rows["input"])), *(part(rows.get(task)) for task, parts in CELLS.items() for part in parts)]
        lines.append("| " + " | ".join(cells) + " |")
    runtime = data["environment"]
    return "\n".join([*lines, "", f"One thread, {runtime['processor']}, onnxruntime {runtime['onnxruntime']}; {BUSY}", ""])


HOWS = ("weights", "calibrated")
BUSY = "a load above 1 is other work on the machine: such times stand only where all of it is pinned to other cores."


def cell(form: Callable[[dict[str, Any]], str], row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return "refused: nothing can be cut" if "refused" in row else form(row)


def timed(low: float, high: float, row: dict[str, Any]) -> str:
    middle = "no verdict" if low < 1 < high else f"{row['time_share']:.2f}"
    return f"{middle} ({low:.2f} to {high:.2f}), {row['load']}"


CELLS = {
    "full": [partial(cell, lambda r: f"{r['cut']} of {r['layers']}"), partial(cell, lambda r: f"{r['difference']:.1e} ({r['on_noise']:.1e})")],
    "macs": [
        partial(cell, lambda r: f"{r['convolution_macs_share']:.3f} of {r['convolution_macs_before'] / 1e6:,.0f} M"),
        partial(cell, lambda r: timed(*r["time_share_quartiles"], r)),
    ],
    "text": [
        partial(cell, lambda r: "; ".join(f"{how}: {r[how]['same']}" for how in HOWS) + f" ({r['right_before']} right before)"),
        partial(cell, lambda r: "; ".join(f"{how}: {r[how]['same_of_more']}" for how in HOWS) + f" ({r['right_of_more_before']} right before)"),
    ],
}

if __name__ == "__main__":
    main()
