"""Figures for papers, by Matplotlib (extra ``plots``)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.errors import SurgeryValueError
from surgery.export.common import need
from surgery.files import as_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from surgery.alternatives import Tradeoff
    from surgery.report import Report

__all__ = ["picture_file", "report_figure", "tradeoff_figure"]

WAS, NOW, ERROR = "#c3cad4", "#2f6fd0", "#b4532a"
INCHES_A_LAYER, INCHES_AROUND, WIDEST_NAME = 0.17, 1.3, 40


def report_figure(report: Report) -> Figure:
    """Bars of MACs (or parameters) and error for every layer, and the trade-off beside them where the report has one.

    Raises:
        MissingExtra: Matplotlib is not installed.
    """
    need("matplotlib", "plot", "plots")
    from matplotlib.figure import Figure

    panels = 3 if report.tradeoff is not None and report.tradeoff.rows else 2
    height = max(2.6, INCHES_AROUND + INCHES_A_LAYER * len(report.layers))
    figure = Figure(figsize=(3.6 * panels, height), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    _cost_bars(axes[0], report)
    axes[1].sharey(axes[0])
    axes[1].barh(range(len(report.layers)), [row.error or 0.0 for row in report.layers], height=0.7, color=ERROR)
    axes[1].tick_params(labelleft=False)
    axes[1].set_xlabel("relative error of the weight")
    if panels == 3 and report.tradeoff is not None:
        _tradeoff_curve(axes[2], report.tradeoff, report.place)
    return figure


def picture_file(path: Any) -> Path:
    """The file for a picture that a user named.

    Raises:
        MissingExtra: Matplotlib is not installed.
        SurgeryTypeError, SurgeryValueError: no path, or Matplotlib knows no format of that ending.
    """
    file = as_path("path", path)
    need("matplotlib", "a picture", "plots")
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    if file.suffix.lower().removeprefix(".") not in known:
        raise SurgeryValueError(f"path: {file}: the ending names the format, one of {', '.join(f'.{ending}' for ending in sorted(known))}")
    return file


def tradeoff_figure(found: Tradeoff) -> Figure:
    """Error against share.

    Raises:
        MissingExtra: Matplotlib is not installed.
    """
    need("matplotlib", "a picture", "plots")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    _tradeoff_curve(figure.subplots(), found, None)
    return figure


def _cost_bars(axis: Any, report: Report) -> None:
    known = report.macs_before is not None
    before = [(row.macs_before if known else row.params_before) or 0 for row in report.layers]
    after = [(row.macs_after if known else row.params_after) or 0 for row in report.layers]
    places = range(len(report.layers))
    axis.barh(places, before, height=0.8, color=WAS, label="before")
    axis.barh(places, after, height=0.45, color=NOW, label="after")
    axis.set_yticks(places, [_name(row.name) for row in report.layers], fontsize=7, parse_math=False)
    axis.invert_yaxis()
    axis.set_xlabel("MACs" if known else "parameters")
    if before:
        axis.legend(fontsize=7, frameon=False)


def _tradeoff_curve(axis: Any, found: Tradeoff, place: tuple[float, float] | None) -> None:
    axis.plot([row.used for row in found.rows], [row.error for row in found.rows], marker="o", markersize=4, color=NOW)
    if place is not None:
        axis.plot(*place, marker="o", markersize=8, color=ERROR, linestyle="", label="this network")
        axis.legend(fontsize=7, frameon=False)
    axis.set_xlabel(f"share of the network's {found.words}")
    axis.set_ylabel("error")
    axis.grid(alpha=0.3)


def _name(name: str) -> str:
    name = name or "(the model)"
    return name if len(name) <= WIDEST_NAME else f"…{name[1 - WIDEST_NAME :]}"
