"""Ranks as they were asked for, by a table of the caller's or by a rule, made into the decision about one layer."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, lcm
from numbers import Integral, Real
from typing import Any

from passes.blockwise import Blockwise
from passes.decompose import most_ranks, refusal_of, refusal_of_ranks, settled
from passes.errors import SurgeryError, SurgeryTypeError, SurgeryValueError
from passes.factorization import Decision, Factorization, Keep
from passes.kinds import kind_of
from passes.site import Site
from surgery.cost import chain_params, macs_under, site_macs, site_params
from surgery.ranks.request import Named
from surgery.ranks.rules import fraction_of

__all__ = ["as_answered", "as_asked", "no_gain"]


def as_asked(site: Site, kind: Blockwise, named: Named) -> Decision:
    """The decision about a layer that the caller named: done as asked, without rounding or guard. A pattern may meet layers that cannot be cut.

    Args:
        site: the layer.
        kind: what plain ranks stand for.
        named: the entry of the table that names the layer.

    Raises:
        SurgeryValueError, SurgeryTypeError: its own name was given, and it cannot be cut so; or the value means nothing for any layer.
    """
    if named.value is None:
        return Keep("asked to keep it")
    if isinstance(named.value, Keep):
        return named.value
    try:
        asked = _asked(site, kind, named)
    except SurgeryError as error:
        if named.exact or isinstance(named.value, str) or not isinstance(named.value, Sequence | Integral):
            raise
        return Keep(str(error).removeprefix("ranks: "))
    if isinstance(asked, Factorization):
        refusal = site.keep or refusal_of(site, asked)
        if refusal is None:
            return settled(site, asked)
    else:
        refusal = site.keep or asked.reason
    if named.exact:
        raise SurgeryValueError(f"ranks: {named.key!r} cannot be cut as asked: {refusal}")
    return Keep(refusal)


def _asked(site: Site, kind: Blockwise, named: Named) -> Factorization | Keep:
    """The factorization that a table's value stands for, or why the layer has none of such ranks."""
    value, what = named.value, f"ranks: {named.key!r}"
    if isinstance(value, Factorization):
        return value
    reason = kind.refuses(site.geometry)
    if reason is not None:
        return Keep(reason)
    if isinstance(value, Real) and not isinstance(value, Integral):
        return kind.from_ranks(site.geometry, _shares(float(value), most_ranks(site, kind), kind.unit(site.geometry), what))
    ranks = _ranks(value, kind, f"{what} ({site})")
    if all(rank is None for rank in ranks):
        raise SurgeryValueError(f"{what}: no mode is cut; to keep the layer give None")
    refusal = refusal_of_ranks(site, kind, tuple(ranks))
    return kind.from_ranks(site.geometry, ranks) if refusal is None else Keep(refusal)


def as_answered(site: Site, kind: Blockwise, answer: Any, round_to: int) -> Decision:
    """A rule's answer as a decision: rounded up, and uncut in a mode that is full or in which nothing was seen.

    Raises:
        SurgeryValueError, SurgeryTypeError: the answer means nothing, or cannot be done.
    """
    if isinstance(answer, Keep):
        return answer
    if answer is None:
        return Keep("the rule keeps it")
    if isinstance(answer, Factorization):
        refusal = refusal_of(site, answer)
        if refusal is not None:
            raise SurgeryValueError(f"the rank rule answered {answer} for {site}: {refusal}")
        return _rounded_up(site, answer, round_to)
    what = f"the rank rule's answer for {site}"
    full, unit = kind.full_ranks(site.geometry), kind.unit(site.geometry)
    if isinstance(answer, Real) and not isinstance(answer, Integral):
        answer = _shares(float(answer), full, unit, what)
    ranks: list[int | None] = []
    for rank, most in zip(_ranks(answer, kind, what, zero=True), full, strict=True):
        if rank is not None and rank > most:
            raise SurgeryValueError(f"{what}: rank {rank} is above the full rank {most}")
        rounded = None if not rank else _round(rank, unit, round_to)
        ranks.append(None if rounded is None or rounded >= most else rounded)
    if all(rank is None for rank in ranks):
        return Keep(f"at full rank ({', '.join(map(str, full))}) a chain saves nothing")
    return kind.from_ranks(site.geometry, ranks)


def no_gain(site: Site, factorization: Factorization) -> Keep | None:
    """Why a chain is not worth making: it would take no fewer parameters, or no fewer MACs. None where it is."""
    shapes = kind_of(factorization).shapes(site.geometry, factorization, site.bias is not None)
    ranks = "(" + ", ".join("full" if r is None else str(r) for r in factorization.ranks) + ")"
    before, after = site_params(site), chain_params(shapes)
    if after >= before:
        return Keep(f"no gain: ranks {ranks} would take {after:,} parameters instead of {before:,}")
    macs_before, macs_after = site_macs(site), macs_under(site, factorization)
    if macs_before and macs_after >= macs_before:
        return Keep(f"no gain: ranks {ranks} would take {macs_after:,} MACs instead of {macs_before:,}")
    return None


def _rounded_up(site: Site, factorization: Factorization, round_to: int) -> Factorization:
    kind = kind_of(factorization)
    full, unit = kind.full_ranks(site.geometry), kind.unit(site.geometry)
    ranks = [None if r is None else min(_round(r, unit, round_to), f) for r, f in zip(factorization.ranks, full, strict=True)]
    return kind.from_ranks(site.geometry, ranks)


def _round(rank: int, unit: int, round_to: int) -> int:
    step = lcm(round_to, unit)
    return step * ceil(rank / step)


def _shares(share: float, full: Sequence[int], unit: int, what: str) -> list[int]:
    """In every mode this share of the full rank."""
    if not 0 < share <= 1:
        raise SurgeryValueError(f"{what}: a fraction must be in (0, 1], got {share}")
    return [unit * fraction_of(most // unit, share) for most in full]


def _ranks(value: Any, kind: Blockwise, what: str, *, zero: bool = False) -> list[int | None]:
    """One rank a mode: an int where the kind has one mode, else a sequence of ints and None."""
    modes, given = kind.modes, value
    if isinstance(value, Integral) and not isinstance(value, bool):
        value = [value]
    if isinstance(value, str | bytes) or not isinstance(value, Sequence) or len(value) != len(modes):
        expected = "an int" if len(modes) == 1 else f"{len(modes)} ranks ({', '.join('rank_' + m for m in modes)})"
        raise SurgeryTypeError(f"{what}: {kind.name} takes {expected}, a fraction, a factorization or None, got {given!r}")
    least = 0 if zero else 1
    for rank in value:
        if rank is None and len(modes) > 1:
            continue
        if not isinstance(rank, Integral) or isinstance(rank, bool):
            raise SurgeryTypeError(f"{what}: a rank is an int, got {rank!r}")
        if rank < least:
            raise SurgeryValueError(f"{what}: a rank is at least {least}, got {rank}")
    return [None if rank is None else int(rank) for rank in value]
