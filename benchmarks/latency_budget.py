"""Does a latency budget give the time that it asks for, and is its plan better than one fraction everywhere?

    python benchmarks/latency_budget.py [--only NAME ...] [--runtimes NAME ...] [--ways plan] [--share 0.7] [--threads N] [--table]

For each network and runtime two rows:

- ``plan``: a plan under ``Budget(latency=SHARE)`` with a cold cache and once more with the warm one, the seconds of both, the network measured anew
  by ``surgery.benchmark``, and whether it is slower than the original beyond noise. A share that is refused as out of reach is a row too.
- ``uniform``: the best uniform plan of equal measured time: by bisection over the fraction (ranks in multiples of 16, as kernels like them), each
  step measured the same way, the least error among those that are no slower than ours by more than 2 %.

The error is the root mean square of |W - W'|_F / |W|_F over all convolutions. Weights are those of ``synthetic.py``. Every row is appended to
``benchmarks/results/latency_budget.jsonl`` when it is done, and a row that is there is not measured again, so a run that was stopped goes on. Table
and picture (``latency_budget.md``, ``latency_budget.png``) are made of all rows at the end; ``--table`` makes them of what is there. Let nothing else
run on the machine meanwhile; the load average is kept with the rows so that readers can tell. All of it takes about an hour on two idle cores.
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
from latency_budget_table import draw, table
from torch import Tensor, nn

import surgery
from surgery.benchmark import environment
from surgery.zoo import make

RESULTS = Path(__file__).parent / "results" / "latency_budget.jsonl"
NETWORKS = ("torchvision:resnet18", "torchvision:resnet50", "torchvision:vgg16")
RUNTIMES = ("onnxruntime", "openvino", "eager", "compile")
WAYS = ("plan", "uniform")
KEY = ("network", "runtime", "asked", "threads", "way")
STEPS = 6
NO_SLOWER = 1.02


def network(name: str) -> tuple[nn.Module, Tensor]:
    model, shape = make(name)
    return synthetic.fill(model).eval(), torch.randn(shape, generator=torch.Generator().manual_seed(0))


def error(net: nn.Module) -> float:
    """Root mean square of the convolutions' errors, kept ones counted as 0."""
    errors = [row.error or 0.0 for row in surgery.report(net).layers if not row.layer.startswith("Linear")]
    return (sum(e * e for e in errors) / len(errors)) ** 0.5


def measured(model: nn.Module, net: nn.Module, inputs: Tensor, key: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Time of a network as a share of the model's, with its spread and the verdict."""
    (row,) = surgery.benchmark(model, net, inputs, runtimes=[key["runtime"]], repeats=repeats, threads=key["threads"]).rows
    return {"share": 1 / row.time_ratio, "low": 1 / row.time_ratio_high, "high": 1 / row.time_ratio_low, "verdict": row.verdict}


def planned(key: dict[str, Any], repeats: int) -> dict[str, Any]:
    """The row of a latency budget."""
    model, inputs = network(key["network"])
    budget = surgery.Budget(latency=key["asked"], runtime=key["runtime"], threads=key["threads"])
    row: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["SURGERY_CACHE"] = cache
        for state in ("cold", "warm"):
            wall, cpu = time.perf_counter(), time.process_time()
            try:
                plan = surgery.plan(model, budget, example_inputs=inputs)
            except surgery.SurgeryValueError as refused:
                return row | {"refused": str(refused)}
            row |= {f"seconds_{state}": time.perf_counter() - wall, f"cpu_seconds_{state}": time.process_time() - cpu}
            row[f"own_word_{state}"] = str(plan.latency)
    net = surgery.decompose(model, plan, example_inputs=inputs)
    report = surgery.report(net)
    row |= {"error": error(net), "macs": report.macs_after / report.macs_before}  # type: ignore[operator]
    row["cut"] = sum(layer.factorization is not None for layer in report.layers)
    return row | measured(model, net, inputs, key, repeats)


def uniform(key: dict[str, Any], repeats: int, most: float) -> dict[str, Any]:
    """The row of uniform plans around the time ``most``."""
    model, inputs = network(key["network"])
    tried: list[dict[str, Any]] = []
    low, high = 0.05, 0.95
    for _ in range(STEPS):
        fraction = (low + high) / 2
        net = surgery.decompose(model, fraction, example_inputs=inputs, round_to=16)
        tried.append({"fraction": fraction, "error": error(net)} | measured(model, net, inputs, key, repeats))
        low, high = (fraction, high) if tried[-1]["share"] <= most else (low, fraction)
    fit = [step for step in tried if step["share"] <= most]
    return {"tried": tried, "best": min(fit, key=lambda step: step["error"]) if fit else None}


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def installed() -> list[str]:
    return [name for name in RUNTIMES if name not in ("onnxruntime", "openvino") or importlib.util.find_spec(name) is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", default=NETWORKS, help="these networks")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, help="default: all that are installed")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="these rows only")
    parser.add_argument("--share", type=float, default=0.7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    known = {tuple(row[k] for k in KEY): row for row in read(options.out)}
    wanted = [] if options.table else [(n, r, w) for r in options.runtimes or installed() for n in options.only for w in options.ways]
    for name, runtime, way in wanted:
        key = dict(zip(KEY, (name, runtime, options.share, options.threads, way), strict=True))
        ours = known.get((*list(key.values())[:-1], "plan"), {})
        if tuple(key.values()) in known or (way == "uniform" and not ours.get("cut")):
            continue
        load = os.getloadavg()[0]
        found = planned(key, options.repeats) if way == "plan" else uniform(key, options.repeats, NO_SLOWER * ours["share"])
        row = key | found | {"load_average": load, "environment": environment([runtime] if runtime in ("onnxruntime", "openvino") else [])}
        known[tuple(key.values())] = row
        print(json.dumps({k: v for k, v in row.items() if k != "tried"}), flush=True)
        options.out.parent.mkdir(exist_ok=True)
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
    rows = read(options.out)
    if rows:
        options.out.with_suffix(".md").write_text(table(rows))
        draw(options.out.with_suffix(".png"), rows)


if __name__ == "__main__":
    main()
