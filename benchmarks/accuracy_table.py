"""Table and picture of the rows of ``accuracy.py``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TITLES = {
    "fraction": "weights alone, one fraction everywhere (peers)",
    "weights": "weights alone, budget",
    "data": "calibrated",
    "auto": 'calibrated, `method="auto"`',
    "refine": "calibrated, then polished (`refine=`)",
}
GROUPS = (("resnet56", 0.5), ("resnet56", 0.7), ("resnet20", 0.7), ("vdsr", 0.5))

Rows = list[dict[str, Any]]


def lost(rows: Rows, network: str, share: float, way: str) -> list[float]:
    """What each draw has lost against the original."""
    before = next(row["score"] for row in rows if row["network"] == network and row["way"] == "original")
    return [before - row["score"] for row in rows if (row["network"], row["share"], row["way"]) == (network, share, way)]


def groups(rows: Rows) -> list[tuple[str, float]]:
    return [group for group in GROUPS if any((row["network"], row["share"]) == group and "score" in row for row in rows)]


def table(rows: Rows, missing: Sequence[str] = ()) -> str:
    """Markdown: a line for each network, budget and way, means over the draws; and the names of rows that are still to be measured."""
    lines = [
        "# Accuracy before any training",
        "",
        "Trained networks, cut to a share of their MACs, nothing trained on. ResNet-20 and ResNet-56: top-1 on all 10,000 test images of",
        "CIFAR-10; calibrated on 1,024 training images without their labels. VDSR: PSNR on Set5 x3, calibrated on 37 pieces of the photographs that",
        "scikit-image ships. Parameters and MACs are shares of the original's, seconds those of everything the surgery does. Means over disjoint",
        "draws of calibration examples, in brackets the least and the most.",
        "",
        *conditions(rows),
        "",
        "| network | MACs | way | score | lost | parameters | draws | CPU seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for network, share in groups(rows):
        before = next(row for row in rows if row["network"] == network and row["way"] == "original")
        lines.append(f"| {network} | 1 | original | {before['score']:.2f} {before['unit']} | | 1 | | |")
        for way, title in TITLES.items():
            mine = [row for row in rows if (row["network"], row["share"], row["way"]) == (network, share, way)]
            if not mine:
                continue
            gone = lost(rows, network, share, way)
            spread = f" ({min(gone):.2f} to {max(gone):.2f})" if len(gone) > 1 else ""
            lines.append(
                f"| {network} | {_mean(mine, 'macs'):.3f} | {title} | {_mean(mine, 'score'):.2f} | {statistics.fmean(gone):.2f}{spread} | "
                f"{_mean(mine, 'params'):.2f} | {len(mine) if mine[0]['calibrated'] else ''} | "
                f"{_mean(mine, 'cpu_seconds'):.0f} |"
            )
    planned = [row for row in rows if row["way"] == "plan"]
    if planned:
        row = planned[0]
        lines += ["", f"Planning {row['network']} by MACs took {row['cpu_seconds']:.1f} s of CPU time ({row['seconds']:.1f} s by the clock, "]
        lines[-1] += f"load average {row['load_average']:.1f}, threads: {row['threads']})."
    for row in rows:
        if row["way"] == "refine" and row["threads"] > 1:
            lines += ["", f"Cut, correction and polishing of {row['network']} took {row['seconds']:.0f} s by the clock on {row['threads']} threads."]
    if missing:
        lines += ["", f"Still to be measured ({len(missing)}): {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def conditions(rows: Rows) -> list[str]:
    """On what it was measured: a line for each environment."""
    environments = {tuple(sorted(row["environment"].items())) for row in rows}
    return ["; ".join(f"{name} {value}" for name, value in environment) for environment in sorted(environments)]


def _mean(rows: Rows, name: str) -> float:
    return statistics.fmean(row[name] for row in rows)


def draw(out: Path, rows: Rows) -> None:
    """What was lost, for each network and budget, a bar a way: the mean over draws, the least and the most."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    panels = [(network, share) for network, share in groups(rows) if any(lost(rows, network, share, way) for way in TITLES)]
    if not panels:
        return
    figure = Figure(figsize=(2.7 * len(panels), 3.8), layout="constrained")
    for axes, (network, share) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        heights = []
        for place, way in enumerate(TITLES):
            gone = lost(rows, network, share, way)
            if gone:
                mean = statistics.fmean(gone)
                axes.bar(place, mean, yerr=[[mean - min(gone)], [max(gone) - mean]], color=f"C{place}", capsize=3)
                axes.text(place, max(gone), f"{mean:.2f}", ha="center", va="bottom", fontsize=8)
                heights += gone
        axes.set_title(f"{network}, MACs x {share}", fontsize=9)
        axes.set_xticks(range(len(TITLES)), TITLES, rotation=60, fontsize=8)
        axes.set_yscale("symlog", linthresh=1.0)
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.set_ylim(min(0.0, *heights), 1.6 * max(heights))
        axes.set_ylabel("lost, dB" if network == "vdsr" else "lost, points of top-1")
        axes.grid(axis="y", alpha=0.3)
    figure.savefig(out, dpi=130)
