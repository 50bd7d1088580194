"""Does a latency budget give the time that it asks for, and is its plan better than one fraction everywhere?

    python benchmarks/latency_budget.py [--only NAME ...] [--runtimes NAME ...] [--share 0.7] [--threads N]

For each network and runtime: a plan under ``Budget(latency=SHARE)``, the network measured anew by ``surgery.benchmark``, and beside it the best
uniform plan of equal measured time: by bisection over the fraction (ranks in multiples of 16, as kernels like them), each step measured the same way,
the least error among those that are no slower than ours by more than 2 %. The error is the root mean square of |W - W'|_F / |W|_F over all
convolutions. Seconds to plan are those with a cold cache and, of a second call, with a warm one.

Weights are those of ``synthetic.py``. Results go to ``benchmarks/results/latency_budget.json`` after each row, the picture to ``latency_budget.png``
beside it. Let nothing else run on the machine meanwhile; the load average is kept with the rows so that readers can tell.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import synthetic
import torch
from torch import Tensor, nn

import surgery
from surgery.benchmark import environment
from surgery.zoo import make

RESULTS = Path(__file__).parent / "results" / "latency_budget.json"
NETWORKS = ("torchvision:resnet18", "torchvision:resnet50", "torchvision:vgg16")
RUNTIMES = ("onnxruntime", "openvino", "eager", "compile")
STEPS = 5
NO_SLOWER = 1.02


def error(net: nn.Module) -> float:
    """Root mean square of the convolutions' errors, kept ones counted as 0."""
    errors = [row.error or 0.0 for row in surgery.report(net).layers if not row.layer.startswith("Linear")]
    return (sum(e * e for e in errors) / len(errors)) ** 0.5


def share(model: nn.Module, net: nn.Module, inputs: Tensor, runtime: str, threads: int, repeats: int) -> dict[str, float]:
    """Measured time of a network as a share of the model's, with quartiles."""
    (row,) = surgery.benchmark(model, net, inputs, runtimes=[runtime], repeats=repeats, threads=threads).rows
    return {"median": 1 / row.time_ratio, "low": 1 / row.time_ratio_high, "high": 1 / row.time_ratio_low}


def uniform(model: nn.Module, inputs: Tensor, runtime: str, threads: int, repeats: int, most: float) -> list[dict[str, Any]]:
    """Uniform plans around the time ``most``: fraction, error, measured share."""
    tried, low, high = [], 0.05, 0.95
    for _ in range(STEPS):
        fraction = (low + high) / 2
        net = surgery.decompose(model, fraction, example_inputs=inputs, round_to=16)
        measured = share(model, net, inputs, runtime, threads, repeats)
        tried.append({"fraction": fraction, "error": error(net), "share": measured})
        low, high = (fraction, high) if measured["median"] <= most else (low, fraction)
    return tried


def measure(name: str, runtime: str, asked: float, threads: int, repeats: int, steps_too: bool) -> dict[str, Any]:
    model, shape = make(name)
    synthetic.fill(model).eval()
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    budget = surgery.Budget(latency=asked, runtime=runtime, threads=threads)
    row: dict[str, Any] = {"network": name, "runtime": runtime, "asked": asked, "load_average": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["SURGERY_CACHE"] = cache
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            try:
                net = surgery.decompose(model, budget, example_inputs=inputs)
            except surgery.SurgeryValueError as refused:
                return row | {"refused": str(refused)}
            seconds.append(time.perf_counter() - began)
    report = surgery.report(net)
    found = share(model, net, inputs, runtime, threads, repeats)
    row |= {"seconds_cold": seconds[0], "seconds_warm": seconds[1], "own_word": str(report.latency), "share": found, "error": error(net)}
    row |= {"flops_share": None if report.speedup is None else 1 / report.speedup, "cut": sum(r.factorization is not None for r in report.layers)}
    if steps_too and row["cut"]:
        row["uniform"] = uniform(model, inputs, runtime, threads, repeats, NO_SLOWER * found["median"])
        fit = [u for u in row["uniform"] if u["share"]["median"] <= NO_SLOWER * found["median"]]
        row["best_uniform"] = min(fit, key=lambda u: u["error"]) if fit else None
    return row


def draw(rows: list[dict[str, Any]], asked: float, file: Path) -> None:
    """Error against measured time, a panel a network: our plan and the uniform ones, a colour a runtime."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["network"] for row in rows))
    figure = Figure(figsize=(4.5 * len(names), 4.5), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        for row in (r for r in rows if r["network"] == name and "share" in r):
            colour = f"C{RUNTIMES.index(row['runtime'])}"
            axes.plot(row["share"]["median"], row["error"], "o", color=colour, label=f"{row['runtime']}: budget")
            others = sorted(row.get("uniform", []), key=lambda u: u["share"]["median"])
            axes.plot(
                [u["share"]["median"] for u in others], [u["error"] for u in others], "x--", color=colour, alpha=0.6, label="one fraction everywhere"
            )
        axes.axvspan(0.9 * asked, 1.1 * asked, color="tab:green", alpha=0.1)
        axes.set(xlabel="share of the original's measured time", ylabel="RMS error of the layers", title=name.partition(":")[2])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", default=NETWORKS, help="these networks only; rows of others stay as they are in the results"
    )
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, help="default: all that are installed")
    parser.add_argument("--share", type=float, default=0.7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-uniform", action="store_true", help="leave the uniform plans out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    installed = [name for name in RUNTIMES if name not in ("onnxruntime", "openvino") or importlib.util.find_spec(name) is not None]
    old = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    rows = {(row["network"], row["runtime"]): row for row in old}
    for name in options.only:
        for runtime in options.runtimes or installed:
            row = measure(name, runtime, options.share, options.threads, options.repeats, not options.no_uniform)
            rows[name, runtime] = row
            print(json.dumps({key: value for key, value in row.items() if key != "uniform"}), flush=True)
            facts = {"decay": synthetic.DECAY, "noise": synthetic.NOISE, "seed": 0}
            found = {"environment": environment(installed), "threads": options.threads, "synthetic": facts, "rows": list(rows.values())}
            options.out.parent.mkdir(exist_ok=True)
            options.out.write_text(json.dumps(found, indent=1) + "\n")
            draw(list(rows.values()), options.share, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
