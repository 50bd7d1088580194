"""A report as one page of HTML: a file a section. It needs no network and no scripts, and follows the reader's light or dark scheme."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.page import functions, graph, kept, layers, pareto, spectra, totals
from surgery.page.markup import Markup, element, joined
from surgery.page.style import STYLE

if TYPE_CHECKING:
    from surgery.report import Report

__all__ = ["page_of"]

SECTIONS = (totals, pareto, layers, spectra, graph, kept, functions)
"""In their order on the page. Each has ``section(report)``, which gives None where the report has nothing for it."""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page_of(report: Report, title: str = "Surgery report") -> str:
    """The whole page. Names and reasons are only ever text: what they contain cannot become markup, and nothing is fetched or run."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Markup(STYLE)),
    )
    found = [made for each in SECTIONS if (made := each.section(report)) is not None]
    body = element("body", element("main", element("h1", title), *found))
    return joined(Markup("<!doctype html>\n"), element("html", head, body, lang="en"), Markup("\n"))
