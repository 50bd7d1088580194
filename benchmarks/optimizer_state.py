"""Does it help to project the optimizer's state at a cut, instead of beginning it again?

    python benchmarks/optimizer_state.py --data ROOT [--steps 400] [--after 50] [--seeds 3] [--ranks 0.6]

The network of ``small_training.py`` is trained for some steps, then changed in one of four ways: cut by ``decompose``; cut by a schedule; cut by a
schedule after some steps at a tenth of the rate; cut, trained on and fused back. Then four branches see the same batches: changed with the state
projected, changed with the state begun again, not changed, and not changed but with the state begun again. The last tells what a fresh state does by
itself: until its momentum has built up the steps are shorter, and shorter steps alone lower the loss for a while. The loss of each batch just before
its step is compared. ROOT holds ``cifar-10-batches-py``. A row for each case, optimizer, branch and seed goes to
``benchmarks/results/optimizer_state.json``, the picture beside it: the mean over the seeds of how much higher the loss is than that of the network
that goes on unchanged, with its range. The summary has the paired differences of branches. Seeds that are there are not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import small_training as small
import torch
from torch import nn

import surgery
from surgery.benchmark import environment

RESULTS = Path(__file__).parent / "results" / "optimizer_state.json"
OPTIMIZERS = ("sgd", "adam")
PROJECT, RESET, WHOLE, WHOLE_RESET = BRANCHES = ("project", "reset", "whole", "whole, reset")
DIFFERENCES = {
    "reset_less_project": (RESET, PROJECT),
    "whole_reset_less_whole": (WHOLE_RESET, WHOLE),  # what a fresh state does by itself
    "project_less_whole": (PROJECT, WHOLE),  # what the change costs where the state goes on
    "reset_less_whole_reset": (RESET, WHOLE_RESET),  # and where it is begun again
}
WINDOWS = (10, 20, 50)
BETWEEN = 100  # steps at a tenth of the rate, or as a chain, before the change

Change = Callable[[nn.Module, torch.optim.Optimizer, str], None]


def bare(ranks: float) -> Change:
    def change(model: nn.Module, optimizer: torch.optim.Optimizer, state: str) -> None:
        surgery.decompose(model, ranks, optimizer=optimizer, state=state, balanced=True, inplace=True)

    return change


def by_schedule(ranks: float) -> Change:
    def change(model: nn.Module, optimizer: torch.optim.Optimizer, state: str) -> None:
        surgery.DecompositionSchedule(0, ranks=ranks, state=state, guard="none").step(0, model, optimizer)

    return change


def fuse(model: nn.Module, optimizer: torch.optim.Optimizer, state: str) -> None:
    surgery.reconstruct(model, optimizer=optimizer, state=state, inplace=True)


CASES: Mapping[str, str] = {
    "decompose": "cut by decompose",
    "schedule": "cut by a schedule",
    "late": "cut by a schedule at a tenth of the rate",
    "fuse": "fused back",
}


def measure(data: small.Data, name: str, seed: int, steps: int, after: int, ranks: float) -> list[dict[str, Any]]:
    """Rows of every case and branch for one optimizer and seed."""
    model = small.network(seed)
    optimizer = small.optimizer_for(name, model)
    small.train(model, optimizer, data.batches(seed, 0, steps))
    slow, slow_optimizer = small.branch(model, optimizer, name)
    for group in slow_optimizer.param_groups:
        group["lr"] *= 0.1
    small.train(slow, slow_optimizer, data.batches(seed, steps, steps + BETWEEN))
    chain, chain_optimizer = small.branch(model, optimizer, name)
    bare(ranks)(chain, chain_optimizer, PROJECT)
    small.train(chain, chain_optimizer, data.batches(seed, steps, steps + BETWEEN))
    cases: dict[str, tuple[nn.Module, torch.optim.Optimizer, Change, int]] = {
        "decompose": (model, optimizer, bare(ranks), steps),
        "schedule": (model, optimizer, by_schedule(ranks), steps),
        "late": (slow, slow_optimizer, by_schedule(ranks), steps + BETWEEN),
        "fuse": (chain, chain_optimizer, fuse, steps + BETWEEN),
    }
    rows = []
    for case, (start, its_optimizer, change, first) in cases.items():
        for branch in BRANCHES:
            twin, other = small.branch(start, its_optimizer, name)
            if branch in (PROJECT, RESET):
                change(twin, other, branch)
            elif branch == WHOLE_RESET:
                other.state.clear()
            losses = small.train(twin, other, data.batches(seed, first, first + after))
            cut = sum(row.status == "decomposed" for row in surgery.report(twin).layers)
            rows.append({"case": case, "optimizer": name, "branch": branch, "seed": seed, "chains": cut, "losses": losses})
    return rows


def losses_of(rows: list[dict[str, Any]], case: str, name: str) -> dict[tuple[str, int], list[float]]:
    return {(row["branch"], row["seed"]): row["losses"] for row in rows if (row["case"], row["optimizer"]) == (case, name)}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """For the first steps after the change: the differences of branches, mean over the steps, paired by seed."""
    found: dict[str, Any] = {}
    for case in CASES:
        for name in OPTIMIZERS:
            by = losses_of(rows, case, name)
            seeds = sorted({seed for _, seed in by})
            for what, (one, two) in DIFFERENCES.items():
                for window in (w for w in WINDOWS if by and w <= len(by[one, seeds[0]])):
                    gaps = [statistics.mean(by[one, s][:window]) - statistics.mean(by[two, s][:window]) for s in seeds]
                    told = {"mean": round(statistics.mean(gaps), 4), "low": round(min(gaps), 4), "high": round(max(gaps), 4)}
                    found.setdefault(case, {}).setdefault(name, {}).setdefault(what, {})[f"first_{window}"] = told
    return found


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """A row of panels an optimizer, a panel a case: loss above that of the unchanged network, smoothed over five steps, a band over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(CASES), 7), layout="constrained")
    panels = figure.subplots(len(OPTIMIZERS), len(CASES), sharex=True, sharey="row", squeeze=False)
    lines = (
        (RESET, "tab:red", "state begun again"),
        (PROJECT, "tab:blue", "state projected"),
        (WHOLE_RESET, "tab:gray", "unchanged, state begun again"),
    )
    for row, name in zip(panels, OPTIMIZERS, strict=True):
        for axes, (case, title) in zip(row, CASES.items(), strict=True):
            by = {key: torch.tensor(losses) for key, losses in losses_of(rows, case, name).items()}
            seeds = sorted({seed for _, seed in by})
            for branch, colour, label in lines:
                gaps = torch.stack([(by[branch, s] - by[WHOLE, s]).unfold(0, 5, 1).mean(1) for s in seeds])
                steps = range(3, 3 + gaps.shape[1])
                axes.plot(steps, gaps.mean(0), color=colour, label=label)
                axes.fill_between(steps, gaps.amin(0), gaps.amax(0), color=colour, alpha=0.15)
            axes.axhline(0, color="black", linewidth=0.5)
            axes.set_title(f"{name}: {title}", fontsize=10)
            axes.grid(alpha=0.3)
            if row[0] is axes:
                axes.set_ylabel("loss above that of the unchanged network")
            if name == OPTIMIZERS[-1]:
                axes.set_xlabel("steps after the change")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=100)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--steps", type=int, default=400, help="before the change")
    parser.add_argument("--after", type=int, default=50, help="steps after it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=float, default=0.6, help="fraction of the full rank")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    data = small.Data.read(options.data)
    facts = {
        "steps": options.steps,
        "between": BETWEEN,
        "after": options.after,
        "ranks": options.ranks,
        "batch": small.BATCH,
        "files": list(small.FILES),
    }
    old = json.loads(options.out.read_text()) if options.out.exists() else {}
    rows = old["rows"] if all(old.get(key) == value for key, value in facts.items()) else []
    for seed in range(options.seeds):
        for name in OPTIMIZERS:
            if any((row["optimizer"], row["seed"]) == (name, seed) for row in rows):
                continue
            rows += measure(data, name, seed, options.steps, options.after, options.ranks)
            print(json.dumps({"seed": seed, "optimizer": name, "so far": {case: by.get(name) for case, by in summary(rows).items()}}), flush=True)
            options.out.parent.mkdir(exist_ok=True)
            facts |= {"environment": environment(), "threads": torch.get_num_threads()}
            options.out.write_text(json.dumps({**facts, "summary": summary(rows), "rows": rows}, indent=1) + "\n")
    draw(rows, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
