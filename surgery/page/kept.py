"""The layers that were left as they are, grouped by the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.page.markup import Markup, element

if TYPE_CHECKING:
    from surgery.report import Report

__all__ = ["section"]


def section(report: Report) -> Markup | None:
    groups: dict[str, list[str]] = {}
    for row in report.layers:
        if row.status == "kept":
            groups.setdefault(row.reason or "no reason recorded", []).append(row.name or "(the model)")
    if not groups:
        return None
    cards = [
        element(
            "div",
            element("h3", reason),
            element("p", f"{len(names)} layer{'s' if len(names) > 1 else ''}"),
            element("ul", *(element("li", element("span", name, class_="name")) for name in names)),
            class_="card",
        )
        for reason, names in sorted(groups.items(), key=lambda group: -len(group[1]))
    ]
    return element("section", element("h2", "Kept, and why"), element("div", *cards, class_="groups"))
