"""Does it help to project the optimizer's state at a cut, instead of beginning it again?

    python benchmarks/optimizer_state.py --data ROOT [--steps 150] [--after 50] [--seeds 3] [--ranks 0.6]

The network of ``small_training.py`` is trained for some steps, then goes on in three branches that see the same batches: cut with the state
projected, cut with the state begun again, and not cut at all. The loss of each batch just before its step is compared. ROOT holds
``cifar-10-batches-py``. A row for each optimizer, branch and seed goes to ``benchmarks/results/optimizer_state.json``, the picture beside it: the
mean over the seeds of how much higher the loss is than without a cut, with its range. The summary has the paired difference of the two branches.
Seeds that are there are not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import small_training as small
import torch

import surgery
from surgery.benchmark import environment

RESULTS = Path(__file__).parent / "results" / "optimizer_state.json"
BRANCHES = ("project", "reset", "whole")
OPTIMIZERS = ("sgd", "adam")
WINDOWS = (10, 20, 50)


def measure(data: small.Data, name: str, seed: int, steps: int, after: int, ranks: float) -> list[dict[str, Any]]:
    model = small.network(seed)
    optimizer = small.optimizer_for(name, model)
    before = small.train(model, optimizer, data.batches(seed, 0, steps))
    rows = []
    for kind in BRANCHES:
        twin, other = small.branch(model, optimizer, name)
        cut = 0
        if kind != "whole":
            surgery.decompose(twin, ranks, optimizer=other, state=kind, balanced=True, inplace=True)
            cut = sum(row.status == "decomposed" for row in surgery.report(twin).layers)
        losses = small.train(twin, other, data.batches(seed, steps, steps + after))
        rows.append({"optimizer": name, "branch": kind, "seed": seed, "cut": cut, "loss_before": statistics.mean(before[-20:]), "losses": losses})
    return rows


def summary(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """For the first steps after the cut: reset less projected, mean over the steps, paired by seed."""
    by = {(row["branch"], row["seed"]): row["losses"] for row in rows if row["optimizer"] == name}
    seeds = sorted({seed for _, seed in by})
    found: dict[str, Any] = {}
    for window in WINDOWS:
        gaps = [statistics.mean(by["reset", s][:window]) - statistics.mean(by["project", s][:window]) for s in seeds]
        found[f"first_{window}"] = {"reset_less_project": statistics.mean(gaps), "low": min(gaps), "high": max(gaps)}
    return found


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """A panel an optimizer: loss above that of the uncut network, smoothed over five steps, a line a branch, a band over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), OPTIMIZERS, strict=True):
        mine = {(row["branch"], row["seed"]): torch.tensor(row["losses"]) for row in rows if row["optimizer"] == name}
        seeds = sorted({seed for _, seed in mine})
        for kind, colour in (("reset", "tab:red"), ("project", "tab:blue")):
            gaps = torch.stack([(mine[kind, s] - mine["whole", s]).unfold(0, 5, 1).mean(1) for s in seeds])
            steps = range(3, 3 + gaps.shape[1])
            axes.plot(steps, gaps.mean(0), color=colour, label=f"state {'projected' if kind == 'project' else 'begun again'}")
            axes.fill_between(steps, gaps.amin(0), gaps.amax(0), color=colour, alpha=0.15)
        axes.axhline(0, color="black", linewidth=0.5)
        axes.set(title=name, xlabel="steps after the cut", ylabel="loss above that of the network that was not cut")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--steps", type=int, default=150, help="before the cut")
    parser.add_argument("--after", type=int, default=50, help="steps after it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=float, default=0.6, help="fraction of the full rank")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    data = small.Data.read(options.data)
    facts = {"steps": options.steps, "after": options.after, "ranks": options.ranks, "batch": small.BATCH, "files": list(small.FILES)}
    old = json.loads(options.out.read_text()) if options.out.exists() else {}
    rows = old["rows"] if all(old.get(key) == value for key, value in facts.items()) else []
    for seed in range(options.seeds):
        for name in OPTIMIZERS:
            if any((row["optimizer"], row["seed"]) == (name, seed) for row in rows):
                continue
            rows += measure(data, name, seed, options.steps, options.after, options.ranks)
            summaries = {each: summary(rows, each) for each in OPTIMIZERS if any(row["optimizer"] == each for row in rows)}
            print(json.dumps({"seed": seed, "optimizer": name} | summaries[name]), flush=True)
            options.out.parent.mkdir(exist_ok=True)
            text = json.dumps(
                {"environment": environment(), "threads": torch.get_num_threads(), **facts, "summary": summaries, "rows": rows}, indent=1
            )
            options.out.write_text(text + "\n")
    draw(rows, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
