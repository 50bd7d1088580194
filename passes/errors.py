"""Every error that users meet. Each message names the site or argument, what was expected, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "MissingExtra",
    "ParityError",
    "SurgeryError",
    "SurgeryTypeError",
    "SurgeryValueError",
    "nearest",
    "true_or_false",
]


class SurgeryError(Exception):
    """Base of all errors raised on purpose by this project."""


class SurgeryValueError(SurgeryError, ValueError):
    """An argument, a plan or a file has a value that cannot be used."""


class SurgeryTypeError(SurgeryError, TypeError):
    """An argument has a type that cannot be used."""


class ParityError(SurgeryError, RuntimeError):
    """Two networks that must compute the same function do not."""


class MissingExtra(SurgeryError, ImportError):
    """An optional dependency is needed and absent; the message names the extra to install."""

    @classmethod
    def of(cls, what: str, extra: str) -> MissingExtra:
        """``what`` is missing, and which extra brings it."""
        return cls(f"{what}: pip install '.[{extra}]' in a checkout of surgery")


def true_or_false(argument: str, value: object) -> None:
    """Refuse what is no bool: a text such as ``"no"`` would count as true.

    Raises:
        SurgeryTypeError: it is none.
    """
    if not isinstance(value, bool):
        raise SurgeryTypeError(f"{argument}: expected True or False, got {value!r}")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a name that matched nothing: the closest known names, or some of them."""
    names = sorted(set(known))
    if not names:
        return "there are none"
    close = get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(n) for n in close) + "?"
    shown = ", ".join(repr(n) for n in names[:5])
    return f"known names: {shown}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
