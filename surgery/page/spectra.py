"""The spectrum of each layer's weight as it was before the cut, with the chosen rank marked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from passes.outline import Outline, places
from surgery.page.markup import Markup, element

if TYPE_CHECKING:
    from surgery.report import LayerReport, Report

__all__ = ["section"]

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 240, 120, 26, 16, 6, 6
COLOURS = 3


def section(report: Report) -> Markup | None:
    shown = [row for row in report.layers if row.spectra]
    missing = [row for row in report.layers if row.status == "decomposed" and not row.spectra]
    if not shown and not missing:
        return None
    weighted = any(outline.weighted for row in shown for outline in row.spectra)
    told = (
        "Singular values of each weight as it was just before its last cut, as shares of the largest, against their number from 1 to the full rank. "
    )
    told += "The dashed lines are the chosen ranks. They were recorded when the layer was cut; training afterwards does not change them. "
    told += "Where calibration was given, they are those of the weight as the calibration inputs weight it." if weighted else ""
    cards = [
        element(
            "div", element("h3", row.name or "(the model)", class_="name"), _chart(row), element("div", *_legend(row), class_="legend"), class_="card"
        )
        for row in shown
    ]
    return element(
        "section",
        element("h2", "Spectra"),
        element("p", told) if shown else None,
        element("p", f"Not recorded for {len(missing)} decomposed layer{'s' if len(missing) > 1 else ''}: ", _names(missing)) if missing else None,
        element("div", *cards, class_="small"),
    )


def _names(rows: list[LayerReport]) -> Markup:
    return element("span", ", ".join(row.name or "(the model)" for row in rows), class_="name")


def _chart(row: LayerReport) -> Markup:
    right, low = WIDTH - RIGHT, HEIGHT - BOTTOM
    longest = max(outline.full for outline in row.spectra)
    parts = [
        element("path", d=f"M{LEFT} {TOP}V{low}H{right}", class_="axis"),
        element("text", "1", x=LEFT - 4, y=TOP + 8, text_anchor="end"),
        element("text", "0", x=LEFT - 4, y=low, text_anchor="end"),
        element("text", "1", x=LEFT, y=HEIGHT - 3),
        element("text", longest, x=right, y=HEIGHT - 3, text_anchor="end"),
    ]
    for number, outline in enumerate(row.spectra):
        rank = row.ranks[number] if row.ranks is not None and number < len(row.ranks) else None
        if rank is not None:
            x = f"{_x(min(rank, outline.full) - 1, longest):.1f}"
            parts.append(element("line", x1=x, x2=x, y1=TOP, y2=low, class_=f"mark mode{number % COLOURS}"))
        parts.append(element("polyline", points=" ".join(_points(outline, longest)), class_=f"line mode{number % COLOURS}"))
    return element("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"Spectrum of {row.name or 'the model'}")


def _points(outline: Outline, longest: int) -> Iterator[str]:
    height = HEIGHT - BOTTOM - TOP
    for place, value in zip(places(outline.full), outline.values, strict=True):
        yield f"{_x(place, longest):.1f},{TOP + height * (1 - value):.1f}"


def _x(place: int, longest: int) -> float:
    return LEFT + (WIDTH - RIGHT - LEFT) * (place / (longest - 1) if longest > 1 else 0.0)


def _legend(row: LayerReport) -> Iterator[Markup]:
    for number, outline in enumerate(row.spectra):
        rank = row.ranks[number] if row.ranks is not None and number < len(row.ranks) else None
        chosen = "kept, full rank" if row.status == "kept" else "all of" if rank is None else f"{rank} of"
        yield element("span", element("i", class_=f"key mode{number % COLOURS}"), f"{outline.mode}: {chosen} {outline.full}", class_="soft")
