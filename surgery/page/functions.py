"""Convolutions and linear maps that are called as functions, and so are no layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.page.markup import Markup, element
from surgery.tables import function_text

if TYPE_CHECKING:
    from surgery.report import Report

__all__ = ["section"]


def section(report: Report) -> Markup | None:
    if not report.functions:
        return None
    items = [element("li", element("span", f.module or "(the model)", class_="name"), f": {function_text(f)}") for f in report.functions]
    return element("section", element("h2", "Called as functions"), element("ul", *items))
