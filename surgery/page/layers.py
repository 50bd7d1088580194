"""Every layer with bars: MACs, parameters and measured time before and after, error."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.benchmarking.result import NO_VERDICT
from surgery.page.markup import Markup, element
from surgery.tables import USUAL, change, factorization_text

if TYPE_CHECKING:
    from surgery.benchmarking.result import LayerResult
    from surgery.report import LayerReport, Report

__all__ = ["section"]


def section(report: Report) -> Markup | None:
    if not report.layers:
        return None
    most_macs = max((max(row.macs_before or 0, row.macs_after or 0) for row in report.layers), default=0)
    most_params = max(max(row.params_before, row.params_after) for row in report.layers)
    calibrated = any(row.output_error is not None for row in report.layers)
    timings = _timings(report)
    headings = ["Layer", "MACs", "Parameters", *timings, "Error of the weight"] + (["Error of the output"] if calibrated else [])
    rows = [
        element(
            "tr",
            element("td", *_what(row), class_="what"),
            _cost("MACs", row.macs_before, row.macs_after, most_macs),
            _cost("Parameters", row.params_before, row.params_after, most_params),
            *(_time(heading, times.get(row.name), most) for heading, (times, most) in timings.items()),
            _error("Error of the weight", row.error),
            _error("Error of the output", row.output_error) if calibrated else None,
            class_=None if row.status == "decomposed" else "kept",
        )
        for row in report.layers
    ]
    return element(
        "section",
        element("h2", "Layers"),
        element(
            "p",
            element("i", class_="key was"),
            "before, or unchanged",
            element("i", class_="key now"),
            "after. Errors are relative, 0 to 1.",
            " Times are of each layer by itself." if timings else None,
        ),
        element(
            "table",
            element("thead", element("tr", *(element("th", heading, scope="col") for heading in headings))),
            element("tbody", *rows),
            class_="layers",
        ),
    )


def _what(row: LayerReport) -> tuple[Markup, ...]:
    kind = f"{row.kind} " if row.kind in USUAL else ""  # others are named with their ranks
    done = f" → {kind}{factorization_text(row)}" if row.status == "decomposed" else ", kept"
    return (element("span", row.name or "(the model)", class_="name"), element("br"), element("span", f"{row.layer}{done}", class_="soft"))


def _cost(label: str, before: int | None, after: int | None, most: int) -> Markup:
    if before is None or after is None or not most:
        return element("td", "-" if before is None or after is None else change(before, after), data_label=label)
    return element("td", _pair(before / most, after / most), change(before, after), data_label=label)


def _pair(before: float, after: float) -> Markup:
    longer, shorter = sorted((("was", before), ("now", after)), key=lambda pair: -pair[1])  # the shorter one is drawn on top
    bars = [("was", before)] if before == after else [longer, shorter]
    return element("div", *(_bar(kind, share) for kind, share in bars), class_="bar")


def _timings(report: Report) -> dict[str, tuple[dict[str, LayerResult], float]]:
    """By heading, one a runtime: what was measured of each layer, and the longest time."""
    found: dict[str, dict[str, LayerResult]] = {}
    for layer in report.benchmark.layers if report.benchmark is not None else ():
        found.setdefault(f"Time in {layer.runtime}", {})[layer.name] = layer
    return {heading: (times, max(max(t.before_ms, t.after_ms) for t in times.values())) for heading, times in found.items()}


def _time(label: str, found: LayerResult | None, most: float) -> Markup:
    """Without a ratio where the spread is larger than the difference."""
    if found is None:
        return element("td", "-", class_="none", data_label=label)
    told = f"{found.time_ratio:.2f}x" if found.verdict != NO_VERDICT else "no verdict"
    text = f"{found.before_ms:.3g} -> {found.after_ms:.3g} ms, {told}"
    return element("td", _pair(found.before_ms / most, found.after_ms / most), text, data_label=label)


def _error(label: str, error: float | None) -> Markup:
    if error is None:
        return element("td", "-", class_="none", data_label=label)
    return element("td", element("div", _bar("error", error), class_="bar"), f"{error:.3f}", data_label=label)


def _bar(kind: str, share: float) -> Markup:
    return element("i", class_=kind, style=f"width:{100 * min(max(share, 0.0), 1.0):.2f}%")
