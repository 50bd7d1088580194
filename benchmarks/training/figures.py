"""Accuracy against wall time, as in figures 3 to 6 of Elhoushi et al. 2019: a curve a scenario and seed, from where it leaves another's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from training.tables import Logged

__all__ = ["draw"]

SHOWN = 20.0  # points of accuracy below the best that are shown


def draw(runs: Sequence[Logged], file: Path) -> None:
    """One network's runs; of networks for ImageNet top-5 as well."""
    from matplotlib.figure import Figure

    measures = ("top5", "top1") if runs[0].network == "resnet50" else ("top1",)
    longest = max(run.rows[-1]["seconds"] for run in runs)
    unit, name = (3600, "hours") if longest >= 2 * 3600 else (60, "minutes")
    figure = Figure(figsize=(7.5 * len(measures), 5), layout="constrained")
    colours = {scenario: f"C{number}" for number, scenario in enumerate(dict.fromkeys(run.name for run in runs))}
    for axes, measure in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures, strict=True):
        for number, run in enumerate(runs):
            first = next(other for other in runs if other.name == run.name) is run
            shared = max((run.shared_with(other) for other in runs[:number]), default=0)
            rows = run.rows[max(shared - 1, 0) :]
            colour = colours[run.name]
            label = (run.name if run.complete else f"{run.name}, {len(run.rows)} epochs so far") if first else None
            axes.plot([row["seconds"] / unit for row in rows], [row[measure] for row in rows], color=colour, alpha=0.8, linewidth=1, label=label)
            for row in run.rows[shared:]:
                if row["surgery"]:
                    marker = "o" if row["surgery"] == "decomposed" else "s"
                    axes.plot(row["seconds"] / unit, row[measure], marker, color=colour, markersize=4)
        best = max(row[measure] for run in runs for row in run.rows)
        axes.set(xlabel=f"{name} of wall time, surgery and evaluation included", ylabel=f"top-{measure[3:]} on the test pictures, %")
        axes.set(title=f"{runs[0].network}, {runs[0].facts['epochs']} epochs", ylim=(best - SHOWN, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)
