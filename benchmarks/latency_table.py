"""Rows of ``latency.py`` as a table and a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from surgery.benchmarking.result import NO_VERDICT

__all__ = ["draw", "markdown", "recommended"]

Row = dict[str, Any]
MARKERS = "osD^v<>PX*"
TICKS = (0.5, 0.7, 1, 1.4, 2, 2.8, 4, 5.6, 8, 11)


def recommended(rows: Iterable[Row]) -> list[Row]:
    """For each network, runtime, number of threads and batch the fastest cut to half the MACs, of those that are faster beyond their spread.

    What EVBMF and fractions leave is smaller still, but so is its accuracy: other savings are not compared with these.
    """
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row.get("verdict") == "faster" and row["policy"].startswith("macs=0.5"):
            key = tuple(row[name] for name in ("network", "runtime", "threads", "batch"))
            if key not in best or row["time_ratio"] > best[key]["time_ratio"]:
                best[key] = row
    return list(best.values())


def markdown(rows: Sequence[Row]) -> str:
    """A table a runtime, and the conditions."""
    chosen = [id(row) for row in recommended(rows)]
    lines = [
        "# FLOPs reduced against time reduced",
        "",
        "Ratios are original / cut. The time ratio is the median over interleaved pairs, ± half its 99 % confidence interval; time/FLOPs is 1 where",
        "time falls as FLOPs do. There is no verdict where the spread is larger than the difference. **Bold**: recommended, the fastest of the cuts",
        "to half the MACs that are faster beyond their spread. RMS error is that of the weights of all convolutions, before any training.",
        "Weights have the synthetic spectrum of `benchmarks/synthetic.py`: at a given share of the MACs times hardly depend on it, but the ranks of",
        "EVBMF, and with them its ratios, do. A load above 1 is other work, which must be pinned to other cores; rows measured both ways are in",
        "`latency_beside.jsonl`.",
    ]
    for runtime, threads, batch in dict.fromkeys((row["runtime"], row["threads"], row["batch"]) for row in rows):
        group = [row for row in rows if (row["runtime"], row["threads"], row["batch"]) == (runtime, threads, batch)]
        lines += ["", f"## {runtime}, {threads} {'thread' if threads == 1 else 'threads'}, batch {batch}", "", *_conditions(group), ""]
        lines += ["| network | policy | layers cut | FLOPs ratio | time ratio | time/FLOPs | verdict | RMS error | ms before | ms after |"]
        lines += ["|---|---|---:|---:|---:|---:|---|---:|---:|---:|"]
        lines += [_line(row, id(row) in chosen) for row in sorted(group, key=lambda row: row["network"])]
    return "\n".join(lines) + "\n"


def _conditions(group: Sequence[Row]) -> list[str]:
    environments = {tuple(sorted(row["environment"].items())) for row in group}
    told = ["; ".join(f"{name} {value}" for name, value in environment) for environment in sorted(environments)]
    loads = [row["load_average"] for row in group]
    return [*told, "", f"Load average when rows began: {min(loads):.1f} to {max(loads):.1f}."]


def _line(row: Row, bold: bool) -> str:
    if "refused" in row:
        return f"| {row['network']} | {row['policy']} | | | refused: {row['refused'].splitlines()[0].replace('|', '/')} | | | | | |"
    verdict = "none" if row["verdict"] == NO_VERDICT else row["verdict"]
    ratio = f"{row['time_ratio']:.2f} ± {row['spread']:.2f}"
    cells = [
        row["network"],
        row["policy"],
        f"{row['layers_cut']} of {row['layers']}",
        _number(row["flops_ratio"]),
        f"**{ratio}**" if bold else ratio,
        _number(row["quotient"]),
        verdict,
        f"{row['rms_error']:.3f}",
        f"{row['before_ms']:.4g}",
        f"{row['after_ms']:.4g}",
    ]
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def draw(rows: Sequence[Row], file: Path) -> None:
    """FLOPs ratio against time ratio, a panel a runtime, a colour a network, a marker a policy; on the diagonal time falls as FLOPs do."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator

    measured = [row for row in rows if row.get("flops_ratio")]
    if not measured:
        return
    panels = list(dict.fromkeys((row["runtime"], row["threads"], row["batch"]) for row in measured))
    networks, policies = (list(dict.fromkeys(row[what] for row in measured)) for what in ("network", "policy"))
    across = min(len(panels), 3)
    figure = Figure(figsize=(4.6 * across, 4.2 * -(-len(panels) // across) + 1.2), layout="constrained")
    grid = figure.subplots(-(-len(panels) // across), across, squeeze=False)
    most = 1.1 * max(max(row["flops_ratio"], row["time_ratio"]) for row in measured)  # a bar that is longer leaves the picture
    least = 0.9 * min(1.0, *(row["time_ratio"] for row in measured))
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (runtime, threads, batch) in zip(grid.flat, panels, strict=False):
        for row in (row for row in measured if (row["runtime"], row["threads"], row["batch"]) == (runtime, threads, batch)):
            spread = [[row["time_ratio"] - row["time_ratio_low"]], [row["time_ratio_high"] - row["time_ratio"]]]
            marker = MARKERS[policies.index(row["policy"]) % len(MARKERS)]
            axes.errorbar(
                row["flops_ratio"], row["time_ratio"], spread, fmt=marker, color=f"C{networks.index(row['network'])}", ms=5, lw=1, alpha=0.8
            )
        axes.plot([least, most], [least, most], color="grey", lw=1)
        axes.axhline(1, color="grey", lw=0.8, ls=":")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_major_locator(FixedLocator(TICKS))
        axes.set(
            xlabel="FLOPs ratio", ylabel="time ratio", title=f"{runtime}, threads {threads}, batch {batch}", xlim=(0.95, most), ylim=(least, most)
        )
        axes.grid(alpha=0.3)
    colours = [grid.flat[0].plot([], [], "s", color=f"C{index}", label=name)[0] for index, name in enumerate(networks)]
    shapes = [grid.flat[0].plot([], [], MARKERS[i % len(MARKERS)], color="black", label=name)[0] for i, name in enumerate(policies)]
    figure.legend(handles=[*colours, *shapes], loc="outside lower center", ncols=min(5, len(colours) + len(shapes)), fontsize=7)
    figure.savefig(file, dpi=120)
