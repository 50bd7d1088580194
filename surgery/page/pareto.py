"""What other budgets would have cost: the least error at every share of the original network, and where this one is."""

from __future__ import annotations

from math import floor, log10
from typing import TYPE_CHECKING

from surgery.page.markup import Markup, element

if TYPE_CHECKING:
    from surgery.report import Report

__all__ = ["section"]

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 560, 300, 52, 40, 12, 16


def section(report: Report) -> Markup | None:
    found, place = report.tradeoff, report.place
    if found is None or not found.rows:
        return None
    unit = "MACs" if found.unit == "macs" else "parameters"
    told = f"The least error at every budget of {unit}, with ranks chosen for the whole network at once: the root mean square of |W - W'| / |W| over "
    told += f"the {len(found.layers)} layers that could be cut. The curve is foretold from the original's weights; a cut itself can only do better."
    if place is not None:
        told += f" This network: {place[0]:.3f} of the {unit}, error {place[1]:.3f}."
    return element("section", element("h2", f"Error against {unit}"), element("p", told), element("div", _chart(report, unit), class_="plot"))


def _chart(report: Report, unit: str) -> Markup:
    found, place = report.tradeoff, report.place
    points = [(row.used, row.error) for row in found.rows] if found is not None else []
    every = points + ([place] if place is not None else [])
    most_x, most_y = max(1.0, *(x for x, _ in every)), max(1e-9, *(y for _, y in every)) * 1.08

    def at(point: tuple[float, float]) -> tuple[str, str]:
        x, y = point[0] / most_x, point[1] / most_y
        return f"{LEFT + x * (WIDTH - LEFT - RIGHT):.1f}", f"{HEIGHT - BOTTOM - y * (HEIGHT - BOTTOM - TOP):.1f}"

    parts = [element("path", d=f"M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}", class_="axis")]
    for value in _ticks(most_x):
        x, low = at((value, 0.0))
        parts.append(element("text", f"{value:g}", x=x, y=float(low) + 16, text_anchor="middle"))
    for value in _ticks(most_y):
        left, y = at((0.0, value))
        parts.append(element("text", f"{value:g}", x=float(left) - 6, y=float(y) + 4, text_anchor="end"))
        parts.append(element("path", d=f"M{left} {y}H{WIDTH - RIGHT}", class_="axis"))
    parts.append(element("text", f"share of the original's {unit}", x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, text_anchor="middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(element("text", "error", x=12, y=middle, text_anchor="middle", transform=f"rotate(-90 12 {middle})"))
    parts.append(element("polyline", points=" ".join(",".join(at(point)) for point in points), class_="line mode0"))
    for row, point in zip(found.rows if found is not None else (), points, strict=True):
        x, y = at(point)
        parts.append(
            element("circle", element("title", f"{row.used:.3f}: error {row.error:.3f}, {row.cut} layers cut"), cx=x, cy=y, r=3.5, class_="dot")
        )
    if place is not None:
        x, y = at(place)
        parts.append(element("circle", element("title", "this network"), cx=x, cy=y, r=6, class_="here"))
        end = "end" if place[0] > 0.7 * most_x else "start"
        parts.append(element("text", "this network", x=float(x) + (-10 if end == "end" else 10), y=float(y) - 8, text_anchor=end, class_="strong"))
    return element("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"Error against {unit}")


def _ticks(most: float) -> list[float]:
    """Round numbers from 0 to ``most``."""
    power = 10.0 ** floor(log10(most))
    step = next(step for part in (0.2, 0.5, 1.0, 2.0) if (step := part * power) * 8 > most)
    return [float(f"{step * i:.6g}") for i in range(int(most / step * (1 + 1e-9)) + 1)]
