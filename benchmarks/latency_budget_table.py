"""Table and picture of the rows of ``latency_budget.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WITHIN = 0.10  # of the share asked for
COLD, WARM = 480.0, 60.0  # seconds that planning may take

Rows = list[dict[str, Any]]


def uniform_of(rows: Rows, ours: dict[str, Any]) -> dict[str, Any]:
    """The row of uniform plans beside a plan's, empty where there is none."""
    same = ("network", "runtime", "asked", "threads")
    return next((row for row in rows if row["way"] == "uniform" and all(row[k] == ours[k] for k in same)), {})


def table(rows: Rows) -> str:
    """Markdown: a line a network and runtime."""
    lines = ["# Plans by measured time", ""]
    lines += ["| network | runtime | asked | measured | as asked | error | best uniform plan | cold | warm | slower than the original |"]
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for row in (row for row in rows if row["way"] == "plan"):
        head = f"| {row['network'].partition(':')[2]} | {row['runtime']}, {row['threads']} threads | {row['asked']:.2f} |"
        if "refused" in row:
            lines.append(f"{head} {row['refused']} | | | | | | |")
            continue
        near = abs(row["share"] - row["asked"]) <= WITHIN * row["asked"]
        kept = "nothing was cut" if not row["cut"] else "yes" if near else "**no**"
        best = uniform_of(rows, row).get("best")
        other = "" if not uniform_of(rows, row) else "none as fast" if best is None else f"{best['error']:.4f} at {best['share']:.3f}"
        mark = "" if best is None or row["error"] <= best["error"] else " **worse**"
        lines.append(
            f"{head} {row['share']:.3f} ({row['low']:.3f} to {row['high']:.3f}) | {kept} | {row['error']:.4f}{mark} | {other} | "
            f"{_seconds(row['seconds_cold'], COLD)} | {_seconds(row['seconds_warm'], WARM)} | {'**yes**' if row['verdict'] == 'slower' else 'no'} |"
        )
    lines += [
        "",
        "Shares of the original's time, with the spread of the ratios; the error is the root mean square of the layers' relative errors; cold",
    ]
    lines += [
        "and warm are seconds to plan. A figure in bold misses what is accepted: 10 % around what was asked for, an error no worse than that of the"
    ]
    lines += [f"best uniform plan that is slower by 2 % at most, {COLD:.0f} and {WARM:.0f} seconds."]
    return "\n".join(lines) + "\n"


def draw(file: Path, rows: Rows) -> None:
    """Error against measured time, a panel a network: our plan and the uniform ones, a colour a runtime."""
    from matplotlib.figure import Figure

    ours = [row for row in rows if row["way"] == "plan" and "share" in row]
    names, runtimes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("network", "runtime"))
    figure = Figure(figsize=(4.5 * len(names), 4.5), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        for row in (row for row in ours if row["network"] == name):
            colour = f"C{runtimes.index(row['runtime'])}"
            axes.plot(row["share"], row["error"], "o", color=colour, label=f"{row['runtime']}: budget")
            others = sorted(uniform_of(rows, row).get("tried", []), key=lambda step: step["share"])
            if others:
                label = f"{row['runtime']}: one fraction everywhere"
                axes.plot([s["share"] for s in others], [s["error"] for s in others], "x--", color=colour, alpha=0.6, label=label)
        for asked in {row["asked"] for row in ours if row["network"] == name}:
            axes.axvspan((1 - WITHIN) * asked, (1 + WITHIN) * asked, color="tab:green", alpha=0.1)
        axes.set(xlabel="share of the original's measured time", ylabel="RMS error of the layers", title=name.partition(":")[2])
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    figure.savefig(file, dpi=120)


def _seconds(value: float, most: float) -> str:
    return f"{value:.0f} s" if value <= most else f"**{value:.0f} s**"
