"""Runs of one network side by side: means over seeds, and the paper's numbers for the same scenario."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.checkpoint import RUN, read_log, read_run
from training.paper import TABLES
from training.scenario import Scenario

__all__ = ["Logged", "logged", "summary", "table"]

CHANGES = ("decomposed", "reconstructed")  # as rows tell of surgery


@dataclass(frozen=True, slots=True, eq=False)
class Logged:
    """A run as its folder tells it."""

    folder: Path
    facts: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def network(self) -> str:
        return str(self.facts["network"]).rpartition(":")[2]

    @property
    def scenario(self) -> Scenario:
        return Scenario.parse(self.facts["scenario"])

    @property
    def name(self) -> str:
        """Of the scenario, with the label of the way to cut."""
        label = self.facts["label"] if self.scenario != Scenario() else ""
        return f"{self.scenario} ({label})" if label else str(self.scenario)

    @property
    def best_top1(self) -> float:
        """Of the network in its last form: what was better before a cut was another network."""
        changed = [k for k, row in enumerate(self.rows) if row["surgery"] in CHANGES]
        return float(max(row["top1"] for row in self.rows[max(changed, default=0) :]))

    def shared_with(self, other: Logged) -> int:
        """How many first epochs are the same ones, as of two scenarios that branch."""
        if self.facts["seed"] != other.facts["seed"]:
            return 0
        same = (row["seconds"] == its["seconds"] for row, its in zip(self.rows, other.rows, strict=False))
        return sum(itertools.takewhile(bool, same))

    @property
    def complete(self) -> bool:
        return len(self.rows) == self.scenario.length(self.facts["epochs"])


def logged(runs: Path) -> list[Logged]:
    """All runs in a folder that have an epoch, by network, scenario and seed."""
    found = [Logged(file.parent, read_run(file.parent), read_log(file.parent)) for file in sorted(runs.glob(f"*/*/{RUN}"))]
    return sorted((run for run in found if run.rows), key=lambda run: (run.network, _order(run.scenario), run.name, run.facts["seed"]))


def _order(scenario: Scenario) -> tuple[bool, bool, int]:
    return scenario.fine_tune is not None, scenario.reconstruct_at is not None, scenario.decompose_at or 0


def summary(runs: Sequence[Logged]) -> list[dict[str, Any]]:
    """A row a scenario of one network, of complete runs: means over seeds; differences and ratios to the original are taken seed by seed."""
    complete = [run for run in runs if run.complete]
    whole = {run.facts["seed"]: run.rows[-1] for run in complete if run.scenario == Scenario()}
    found = []
    for name in dict.fromkeys(run.name for run in complete):
        mine = {run.facts["seed"]: run for run in complete if run.name == name}
        ends = {seed: run.rows[-1] for seed, run in mine.items()}
        paired = [(ends[seed], whole[seed]) for seed in ends if seed in whole]
        scenario = next(iter(mine.values())).scenario
        cuts = [[row["parameters"] for row in run.rows if row["surgery"] == "decomposed"] for run in mine.values()]
        cut = [parameters[-1] for parameters in cuts if parameters]
        found.append(
            {
                "scenario": name,
                "seeds": sorted(ends),
                "best_top1": statistics.mean(run.best_top1 for run in mine.values()),
                "top1": statistics.mean(row["top1"] for row in ends.values()),
                "top5": statistics.mean(row["top5"] for row in ends.values()),
                "parameters": statistics.mean(row["parameters"] for row in ends.values()),
                "parameters_after_cut": statistics.mean(cut) if cut else None,
                "seconds": statistics.mean(row["seconds"] for row in ends.values()),
                "surgery_seconds": statistics.mean(row["surgery_seconds"] for row in ends.values()),
                "top1_less_original": statistics.mean(row["top1"] - other["top1"] for row, other in paired) if paired else None,
                "original_time_over_time": statistics.mean(other["seconds"] / row["seconds"] for row, other in paired) if paired else None,
                "paper": _published(next(iter(mine.values())).network, str(scenario)),
            }
        )
    return found


def _published(network: str, scenario: str) -> dict[str, float] | None:
    """The paper's row, its time as a ratio too: its hours are of its own machines."""
    rows = TABLES.get(network, {})
    if scenario not in rows:
        return None
    row = rows[scenario]
    return {
        "first": row.first,
        "second": row.second,
        "parameters": row.parameters,
        "hours": row.hours,
        "original_time_over_time": rows["original"].hours / row.hours,
    }


def table(network: str, rows: Sequence[dict[str, Any]]) -> str:
    """A summary as Markdown, the paper's numbers in the columns that follow ours."""
    top5 = network == "resnet50"
    ours, theirs = ("top-1", "top-5") if top5 else ("best", "final"), ("top1", "top5") if top5 else ("best_top1", "top1")
    head = ["scenario", "seeds", *ours, "less original", "parameters", "time", "original / time"]
    head += [f"paper: {name}" for name in (*ours, "parameters", "hours", "original / time")]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        paper = row["paper"]
        cells = [row["scenario"], str(len(row["seeds"])), *(f"{row[name]:.2f}" for name in theirs), _or_blank(row["top1_less_original"], "+.2f")]
        cells += [f"{row['parameters']:,.0f}", _duration(row["seconds"]), _or_blank(row["original_time_over_time"], ".2f")]
        cells += ["", "", "", "", ""] if paper is None else [f"{paper['first']:.2f}", f"{paper['second']:.2f}", f"{paper['parameters']:,.0f}"]
        cells += [] if paper is None else [f"{paper['hours']:.2f}", f"{paper['original_time_over_time']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _or_blank(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
