"""What each thing that is said to keep accuracy through a cut is worth, one at a time.

    python benchmarks/training_ablations.py --data ROOT [--cut-at 300] [--steps 600] [--seeds 2] [--only QUESTION ...]

Every run trains the network of ``small_training.py`` on the same batches of its seed with SGD, the rate a tenth in the last third, and cuts as its
variant says. A row for each variant and seed (accuracy just after the surgery and at the end, loss of the last steps, parameters) is appended to
``benchmarks/results/training_ablations.jsonl``; rows that are there are not run again, so a run that was stopped goes on. The table in
``training_ablations.json`` has the mean of each variant and, paired by seed, how far it is from its question's first variant. With few seeds on a
small network a difference below about one point of accuracy says nothing. ROOT holds ``cifar-10-batches-py``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import small_training as small
import torch

from surgery import DecompositionSchedule
from surgery.benchmark import environment

RESULTS = Path(__file__).parent / "results" / "training_ablations.jsonl"
CALIBRATION = 4  # batches of 64, as for batch norms
STATISTICS = 8
RANKS = 0.4

Variant = Callable[[small.Data, int, int], DecompositionSchedule]


def images(data: small.Data, seed: int, count: int) -> list[torch.Tensor]:
    """So many current batches, unlabelled, that no step of the run uses."""
    return [x for x, _ in data.batches(seed, 10**6, 10**6 + count)]


def at(ranks: Any = RANKS, **options: Any) -> Variant:
    return lambda data, seed, cut_at: DecompositionSchedule(cut_at, ranks=ranks, guard="none", **options)


def data_aware(**options: Any) -> Variant:
    return lambda data, seed, cut_at: at(calibration=images(data, seed, CALIBRATION), **options)(data, seed, cut_at)


PLAIN = at()  # what most questions compare with: run once a seed

QUESTIONS: Mapping[str, Mapping[str, Variant]] = {
    "state": {"project": PLAIN, "reset": at(state="reset")},
    "balance": {"balanced": PLAIN, "as split": at(balanced=False)},
    "decay": {"each": PLAIN, "product": at(decay="product")},
    "rate": {"measured": PLAIN, "1 / number of factors": at(rate=1 / 3), "as layers": at(rate=1)},
    "batch_norm": {"as it was": PLAIN, "taken anew": lambda data, seed, n: at(batch_norm=images(data, seed, STATISTICS))(data, seed, n)},
    "warm_up": {"none": PLAIN, "20 steps": at(warm_up=20), "80 steps": at(warm_up=80)},
    "data": {"weights alone": PLAIN, "current batches": data_aware(), "current batches, as split": data_aware(balanced=False)},
    "deeper": {
        "at once": PLAIN,
        "in two cuts": lambda data, seed, n: DecompositionSchedule([n // 2, n], ranks=[0.7, RANKS], guard="none"),
    },
    "noise": {
        "keep": lambda data, seed, n: at("evbmf")(data, seed, n // 6),
        "tucker-1": lambda data, seed, n: at("evbmf:noise=tucker-1")(data, seed, n // 6),
        "0.4 of full": lambda data, seed, n: at(f"evbmf:noise={RANKS}")(data, seed, n // 6),
    },
    "back": {
        "stays cut": PLAIN,
        "reconstructed": lambda data, seed, n: DecompositionSchedule(n, 2 * n - n // 2, RANKS, guard="none"),
    },
}


def run(data: small.Data, variant: Variant, seed: int, cut_at: int, steps: int) -> dict[str, Any]:
    model = small.network(seed)
    optimizer = small.optimizer_for("sgd", model)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps * 2 // 3])
    schedule = variant(data, seed, cut_at)
    began, after_cut, losses, layers = time.perf_counter(), [], [], 0
    for step in range(steps):
        report = schedule.step(step, model, optimizer, scheduler)
        if report is not None:
            after_cut.append(data.accuracy(model))
            layers = max(layers, sum(row.status == "decomposed" for row in report.layers))
        losses += small.train(model, optimizer, data.batches(seed, step, step + 1))
        scheduler.step()
    return {
        "top1_after_surgery": after_cut,
        "top1": data.accuracy(model),
        "loss": statistics.mean(losses[-50:]),
        "params": sum(p.numel() for p in model.parameters()),
        "layers_cut": layers,
        "seconds": round(time.perf_counter() - began, 1),
    }


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means, and differences to the first variant of the question, seed by seed."""
    found: dict[str, Any] = {}
    for question, variants in QUESTIONS.items():
        first = next(iter(variants))
        mine = {(row["variant"], row["seed"]): row for row in rows if row["question"] == question}
        for variant in variants:
            own = {seed: row for (name, seed), row in mine.items() if name == variant}
            paired = [row["top1"] - mine[first, seed]["top1"] for seed, row in own.items() if (first, seed) in mine]
            if own:
                found.setdefault(question, {})[variant] = {
                    "seeds": len(own),
                    "top1": round(statistics.mean(row["top1"] for row in own.values()), 2),
                    "top1_after_first_surgery": round(statistics.mean((row["top1_after_surgery"] or [0.0])[0] for row in own.values()), 2),
                    "loss": round(statistics.mean(row["loss"] for row in own.values()), 4),
                    "params": statistics.mean(row["params"] for row in own.values()),
                    "top1_less_first_variant": [round(gap, 2) for gap in paired],
                }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--cut-at", type=int, default=300, help="step of the cut")
    parser.add_argument("--steps", type=int, default=600, help="of the whole run")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.out.parent.mkdir(exist_ok=True)
    data = small.Data.read(options.data)
    facts = {"cut_at": options.cut_at, "steps": options.steps, "batch": small.BATCH, "ranks": RANKS}
    for seed in range(options.seeds):
        for question in options.only:
            for name, variant in QUESTIONS[question].items():
                rows = [row for row in read(options.out) if row["seed"] == seed and all(row[k] == v for k, v in facts.items())]
                if any((row["question"], row["variant"]) == (question, name) for row in rows):
                    continue
                plain = next((row for row in rows if row["plain"]), None) if variant is PLAIN else None
                found = plain or run(data, variant, seed, options.cut_at, options.steps) | {"plain": variant is PLAIN}
                row = found | {"question": question, "variant": name, "seed": seed} | facts
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    rows = [row for row in read(options.out) if all(row[k] == v for k, v in facts.items())]
    table = {"environment": environment(), "threads": torch.get_num_threads(), **facts, "summary": summary(rows)}
    options.out.with_suffix(".json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
