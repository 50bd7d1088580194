"""What a user may write for ``ranks=``, turned into a rule, a table of named layers, or a plan. Wrong values are told apart here."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

from passes.errors import SurgeryError, SurgeryTypeError, SurgeryValueError, nearest
from passes.factorization import Keep
from passes.kinds import decision_from_json
from passes.running import shorten
from passes.site import Site
from surgery.plan import Plan
from surgery.ranks.budget import Budget
from surgery.ranks.rules import Energy, Evbmf, Fraction, Rule, Stable

__all__ = ["Named", "Names", "Request", "as_names", "parse_ranks"]

HELP = (
    'ranks: expected "evbmf", "evbmf:weaken=W", "evbmf:noise=SHARE", "energy:P", "stable", a fraction in (0, 1], a dict of layer names, '
    "a Plan or the path of one, a Budget, or a callable (site, spectra) -> ranks"
)


@dataclass(frozen=True, slots=True)
class Named:
    """What was found for a site in a table: the value, whether by its exact name, and the key."""

    value: Any
    exact: bool
    key: str


class Names:
    """Layer names as users write them: exact, or ``"re:..."`` which must match a whole name. Exact beats pattern, then the first wins.

    A pattern that matches convolutions means convolutions; only one that matches none reaches linear layers. With
    ``linear_too`` a pattern means every layer that it matches.
    """

    def __init__(self, argument: str, values: Mapping[str, Any], sites: Sequence[Site], *, linear_too: bool = False) -> None:
        self._exact: dict[str, Named] = {}
        self._patterns: list[tuple[re.Pattern[str], Named, bool]] = []
        known = [alias for site in sites for alias in site.aliases]
        for key, value in values.items():
            if not isinstance(key, str):
                raise SurgeryTypeError(f"{argument}: layer names are strings, got {key!r}")
            if not key.startswith("re:"):
                if key not in known:
                    raise SurgeryValueError(f"{argument}: {key!r} is no layer of this model: {nearest(key, known)}")
                self._exact[key] = Named(value, True, key)
                continue
            try:
                pattern = re.compile(key[3:])
            except re.error as error:
                raise SurgeryValueError(f"{argument}: {key!r} is no regular expression: {error}") from error
            matched = [site for site in sites if any(pattern.fullmatch(a) for a in site.aliases)]
            if not matched:
                raise SurgeryValueError(f"{argument}: {key!r} matches no layer of this model: {nearest(key[3:], known)}")
            self._patterns.append((pattern, Named(value, False, key), linear_too or all(s.geometry.is_linear for s in matched)))

        for site in sites:
            self._check_aliases(argument, site)

    def _check_aliases(self, argument: str, site: Site) -> None:
        named = [self._exact[alias] for alias in site.aliases if alias in self._exact]
        for other in named[1:]:
            both_kept = isinstance(other.value, Keep) and isinstance(named[0].value, Keep)  # each may be so in words of its own
            if other.value != named[0].value and not both_kept:
                raise SurgeryValueError(
                    f"{argument}: {named[0].key!r} and {other.key!r} are one layer or one weight, but get {named[0].value!r} and {other.value!r}"
                )

    def find(self, site: Site) -> Named | None:
        for alias in site.aliases:
            if alias in self._exact:
                return self._exact[alias]
        for pattern, named, linear in self._patterns:
            if (linear or not site.geometry.is_linear) and any(pattern.fullmatch(a) for a in site.aliases):
                return named
        return None


Request = Rule | Mapping[str, Any] | Plan | Budget


def parse_ranks(ranks: Any) -> Request:
    """The rule, table or plan that ``ranks`` asks for.

    Raises:
        SurgeryTypeError: of no type that has a meaning.
        SurgeryValueError: a text that names no rule and no file, or a number out of range.
    """
    if isinstance(ranks, Mapping) and not isinstance(ranks, Plan):
        return {key: _decision_in(key, value) for key, value in ranks.items()}
    if isinstance(ranks, Plan | Budget):
        return ranks
    if isinstance(ranks, Integral):
        raise SurgeryTypeError(f"ranks={ranks!r} is ambiguous: one rank for all layers makes no sense; {HELP.removeprefix('ranks: ')}")
    if isinstance(ranks, Real):
        return Fraction(_share(float(ranks), "ranks"))
    if isinstance(ranks, str):
        return _parse_text(ranks)
    if isinstance(ranks, os.PathLike):
        return Plan.load(ranks)
    if callable(ranks):
        rule: Callable[..., Any] = ranks
        return rule
    raise SurgeryTypeError(f"{HELP}; got {type(ranks).__name__}")


def _decision_in(key: Any, value: Any) -> Any:
    """What a dict gives a layer; a factorization or ``Keep`` may be written as plans write it."""
    if not isinstance(value, Mapping):
        return value
    try:
        return decision_from_json(value)
    except SurgeryError as error:
        raise type(error)(f"ranks: {key!r}: {error}") from error


def as_names(argument: str, names: Any) -> dict[str, None]:
    """``include`` and ``exclude``: one name or several."""
    if isinstance(names, str):
        names = [names]
    if not isinstance(names, Iterable):
        raise SurgeryTypeError(f'{argument}: expected layer names or "re:..." patterns, got {type(names).__name__}')
    several = list(names)
    for name in several:
        if not isinstance(name, str):
            raise SurgeryTypeError(f"{argument}: layer names are strings, got {name!r}")
    return dict.fromkeys(several)


def _parse_text(text: str) -> Request:
    name, _, option = text.partition(":")
    if text == "evbmf":
        return Evbmf()
    if text == "stable":
        return Stable()
    if name == "evbmf":
        return _parse_evbmf(option, text)
    if name == "energy":
        return Energy(_share(_number(option, text), f"ranks={text!r}"))
    if name == "budget":
        return _parse_budget(option, text)
    if text.endswith(".json") or os.path.isfile(text):  # unlike Path's, it is False for what no file can be named
        return Plan.load(text)
    near = get_close_matches(name, ("evbmf", "stable", "energy", "budget"), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise SurgeryValueError(f"{HELP}; got {shorten(repr(text))}, which is no rule and no file{hint}")


def _parse_evbmf(options: str, whole: str) -> Evbmf:
    """``weaken=W`` and ``noise=SHARE`` or ``noise=tucker-1``, separated by commas."""
    weaken: float = 0.0
    noise: float | str | None = None
    for part in options.split(","):
        key, _, value = part.partition("=")
        if key == "weaken":
            weaken = _number(value, whole)
            if not 0 <= weaken < 1:
                raise SurgeryValueError(f"ranks={whole!r}: weaken must be in [0, 1), got {value}")
        elif key == "noise":
            noise = value if value == "tucker-1" else _share(_number(value, whole), f"ranks={whole!r}")
        else:
            raise SurgeryValueError(f'ranks={whole!r}: EVBMF has the options "weaken=W" with W in [0, 1) and "noise=SHARE" or "noise=tucker-1"')
    return Evbmf(weaken, noise)


def _parse_budget(options: str, whole: str) -> Budget:
    """``macs=0.5`` and the like, separated by commas."""
    values: dict[str, Any] = {}
    for part in options.split(","):
        key, _, value = part.partition("=")
        if key not in {field.name for field in fields(Budget)} or not value:
            forms = '"budget:macs=SHARE", "budget:params=SHARE", "budget:latency=SHARE,runtime=NAME" or "budget:max_error=E"'
            raise SurgeryValueError(f"ranks={whole!r}: expected {forms}, got {part!r}")
        if key in ("criterion", "runtime", "profile"):
            values[key] = value
        else:
            values[key] = int(value) if value.isdigit() and key not in ("max_error", "latency") else _number(value, whole)
    return Budget(**values)


def _number(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise SurgeryValueError(f"ranks={whole!r}: {text!r} is not a number") from None


def _share(value: float, what: str) -> float:
    if not 0 < value <= 1:
        raise SurgeryValueError(f"{what}: a fraction must be in (0, 1], got {value}")
    return value
