"""The network before and after: MACs, parameters, layers, time where it was measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from surgery.page.markup import Markup, element
from surgery.tables import count, ratio

if TYPE_CHECKING:
    from surgery.report import Report

__all__ = ["section"]


def section(report: Report) -> Markup:
    cut = sum(row.status == "decomposed" for row in report.layers)
    told = f"the layers' outputs on {report.calibrated:,} calibration examples" if report.calibrated else "the weights alone"
    facts = [
        f"Passes that ran: {', '.join(report.passes)}." if report.passes else "No pass changed this network.",
        f"Ranks and factors were chosen by {told}." if cut else None,
        None if report.latency is None else f"{report.latency}",
    ]
    return element("section", element("dl", *_cards(report, cut), class_="cards"), element("p", " ".join(f for f in facts if f)))


def _cards(report: Report, cut: int) -> Iterator[Markup]:
    if report.macs_before is None:
        yield _card("MACs", "-", "of a forward pass: not known without example inputs")
    else:
        yield _card("MACs", *_change(report.macs_before, report.macs_after, report.speedup))
    yield _card("Parameters", *_change(report.params_before, report.params_after, report.compression))
    yield _card("Layers decomposed", f"{cut} of {len(report.layers)}", f"{len(report.layers) - cut} kept")
    latency = report.latency
    if latency is not None and latency.measured is not None:
        spread = "" if latency.low is None or latency.high is None else f" ({latency.low:.2f} to {latency.high:.2f})"
        yield _card("Share of the original's time", f"{latency.measured:.2f}", f"measured in {latency.runtime}{spread}")
    for row in report.benchmark.rows if report.benchmark is not None else ():
        where = row.runtime if row.batch is None else f"{row.runtime}, batch {row.batch}"
        spread = f"{row.time_ratio_low:.2f} to {row.time_ratio_high:.2f}"
        yield _card(
            f"Time in {where}", f"{row.before_ms:.3g} → {row.after_ms:.3g} ms", f"{row.time_ratio:.2f} times as fast ({spread}): {row.verdict}"
        )


def _change(before: int, after: int | None, factor: float | None) -> tuple[str, str]:
    if before == after:
        return count(before), "unchanged"
    return f"{count(before)} → {count(after)}", f"{ratio(factor)} {'fewer' if after is None or after < before else '(more than before)'}"


def _card(what: str, value: str, more: str) -> Markup:
    return element("div", element("dt", what), element("dd", value), element("dd", more), class_="card")
