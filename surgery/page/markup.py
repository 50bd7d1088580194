"""HTML and SVG from data: everything is escaped unless it was made here."""

from __future__ import annotations

import html
import unicodedata

__all__ = ["Markup", "element", "joined", "text"]

EMPTY = ("meta", "br", "line", "rect", "circle", "path", "polyline")
REPLACED = "\N{REPLACEMENT CHARACTER}"


class Markup(str):
    """Text that is markup already. Only ``element`` and constants of this package become one."""

    __slots__ = ()


def text(value: object) -> Markup:
    """Any value as text: escaped, and without what a file in UTF-8 or a page cannot hold (control characters, halves of surrogate pairs)."""
    if isinstance(value, Markup):
        return value
    clean = "".join(REPLACED if unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n" else c for c in str(value))
    return Markup(html.escape(clean, quote=True))


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """``<name attribute="...">children</name>``.

    Args:
        name: of the element; a constant.
        children: markup, or values that become text; None is left out.
        attributes: ``class_`` is class, other underscores are hyphens; those that are None are left out.
    """
    written = "".join(f' {key.rstrip("_").replace("_", "-")}="{text(value)}"' for key, value in attributes.items() if value is not None)
    if name in EMPTY and not children:
        return Markup(f"<{name}{written}>" if name in ("meta", "br") else f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{joined(*children)}</{name}>")


def joined(*children: object) -> Markup:
    return Markup("".join(text(child) for child in children if child is not None))
