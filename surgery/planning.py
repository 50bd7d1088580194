"""From a request to a plan: every site gets a factorization or a reason to be kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch

from passes.decompose import ALREADY, refusal_of, site_spectra
from passes.errors import SurgeryError, SurgeryTypeError, SurgeryValueError, nearest
from passes.factorization import Decision, Factorization, Keep
from passes.kind import Kind
from passes.kinds import KINDS, kind_named, kind_of, usual_kind
from passes.linalg import Spectrum
from passes.site import Site
from surgery.cost import chain_macs, chain_params, site_macs, site_params
from surgery.plan import Plan
from surgery.ranks.request import Named, Names, as_names, parse_ranks
from surgery.ranks.rules import Rule, fraction_of

__all__ = ["Drawn", "Options", "draw"]

GUARDS = ("macs", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What, beside the ranks, decides on a plan. The defaults here are those of the API and the command line.

    Attributes:
        method: kind for layers with a kernel of more than one pixel; the others take SVD. With ``"svd"`` linear layers are cut too.
        include: names or ``"re:..."`` patterns; only these layers are cut. Also the way to name linear layers.
        exclude: names or patterns of layers that are kept.
        guard: ``"macs"``: what a rule cuts must lower parameters and, where the calls are known, MACs; ``"none"``: nothing is asked.
        round_to: ranks of rules are rounded up to a multiple of this, at most to the full rank.
        device: where to compute; each weight's own by default.
    """

    method: str = "tucker"
    include: Any = None
    exclude: Any = None
    guard: str = "macs"
    round_to: int = 1
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        methods = [kind.factorization.kind for kind in KINDS]
        if self.method not in methods:
            raise SurgeryValueError(f"method: {self.method!r} is none of {methods}; {nearest(str(self.method), methods)}")
        if self.guard not in GUARDS:
            raise SurgeryValueError(f"guard: {self.guard!r} is none of {list(GUARDS)}")
        if not isinstance(self.round_to, int) or isinstance(self.round_to, bool):
            raise SurgeryTypeError(f"round_to: expected an int, got {self.round_to!r}")
        if self.round_to < 1:
            raise SurgeryValueError(f"round_to: must be at least 1, got {self.round_to}")


@dataclass(frozen=True, slots=True)
class Drawn:
    """A plan and the spectra that were computed on the way, by site name, for the factorization to use again."""

    plan: Plan
    spectra: Mapping[str, tuple[Spectrum, ...]]


@dataclass(slots=True)
class _Draft:
    """One planning run: the parsed request and what has been computed so far."""

    options: Options
    rule: Rule | None
    table: Names | None
    replay: bool
    include: Names | None
    exclude: Names | None
    spectra: dict[str, tuple[Spectrum, ...]] = field(default_factory=dict)

    def decide(self, site: Site) -> Decision:
        named = None if self.table is None else self.table.find(site)
        included = None if self.include is None else self.include.find(site)
        if self.exclude is not None and self.exclude.find(site) is not None:
            return Keep("excluded")
        if self.include is not None and included is None:
            return Keep("not included")
        if site.chain is not None and named is None:
            return Keep(ALREADY)
        if self.rule is None:
            if named is None:
                return Keep("not in the plan" if self.replay else "not named")
            return self._explicit(site, named)
        return self._by_rule(site, self.rule, included)

    def _explicit(self, site: Site, named: Named) -> Decision:
        """A layer that the caller named: done as asked, without rounding or guard. A pattern may meet layers that cannot be cut."""
        if named.value is None:
            return Keep("asked to keep it")
        if isinstance(named.value, Keep):
            return named.value
        try:
            decision, refusal = self._requested(site, named), site.keep
        except SurgeryError as error:
            if named.exact or isinstance(named.value, float | str) or not isinstance(named.value, Sequence | int):
                raise
            return Keep(str(error).removeprefix("ranks: "))
        refusal = refusal or (refusal_of(site, decision) if isinstance(decision, Factorization) else decision.reason)
        if refusal is None:
            return decision
        if named.exact:
            raise SurgeryValueError(f"ranks: {named.key!r} cannot be cut as asked: {refusal}")
        return Keep(refusal)

    def _requested(self, site: Site, named: Named) -> Decision:
        """The factorization that a table's value stands for."""
        value = named.value
        if isinstance(value, Factorization):
            return _clip(site, value)
        kind = usual_kind(site.geometry, self.options.method)
        reason = kind.refuses(site.geometry)
        if reason is not None:
            return Keep(reason)
        full = kind.full_ranks(site.geometry)
        if isinstance(value, float):
            if not 0 < value <= 1:
                raise SurgeryValueError(f"ranks: {named.key!r}: a fraction must be in (0, 1], got {value}")
            return kind.from_ranks(site.geometry, [fraction_of(f, value) for f in full])
        ranks = _as_ranks(value, kind, f"ranks: {named.key!r} ({site})")
        _check_range(ranks, kind, site, f"ranks: {named.key!r}")
        return kind.from_ranks(site.geometry, ranks)

    def _by_rule(self, site: Site, rule: Rule, included: Named | None) -> Decision:
        if site.keep is not None:
            if included is not None and included.exact:
                raise SurgeryValueError(f"include: {included.key!r} cannot be cut: {site.keep}")
            return Keep(site.keep)
        if site.geometry.is_linear and included is None and self.options.method != "svd":
            return Keep("linear layers are cut only where they are named")
        kind = usual_kind(site.geometry, self.options.method)
        reason = kind.refuses(site.geometry)
        if reason is not None:
            return Keep(reason)
        if site.calls == ():
            return Keep("the example inputs do not reach it")
        spectra = site_spectra(site, kind, self.options.device)
        decision = self._answer(site, kind, rule(site, spectra))
        if isinstance(decision, Factorization):
            decision = self._guard(site, decision)
        if isinstance(decision, Factorization):
            self.spectra[site.name] = spectra
        return decision

    def _answer(self, site: Site, kind: Kind, answer: Any) -> Decision:
        """A rule's answer as a factorization: rounded up, and uncut in a mode that is full or in which nothing was seen."""
        if isinstance(answer, Keep):
            return answer
        if answer is None:
            return Keep("the rule keeps it")
        if isinstance(answer, Factorization):
            refusal = refusal_of(site, answer)
            if refusal is not None:
                raise SurgeryValueError(f"the rank rule answered {answer} for {site}: {refusal}")
            return _clip(site, answer)
        what = f"the rank rule's answer for {site}"
        full = kind.full_ranks(site.geometry)
        ranks: list[int | None] = []
        for rank, most in zip(_as_ranks(answer, kind, what, zero=True), full, strict=True):
            if rank is not None and rank > most:
                raise SurgeryValueError(f"{what}: rank {rank} is above the full rank {most}")
            rounded = None if not rank else self.options.round_to * ceil(rank / self.options.round_to)
            ranks.append(None if rounded is None or rounded >= most else rounded)
        if all(rank is None for rank in ranks):
            return Keep(f"at full rank ({', '.join(map(str, full))}) a chain saves nothing")
        return kind.from_ranks(site.geometry, ranks)

    def _guard(self, site: Site, factorization: Factorization) -> Decision:
        if self.options.guard == "none":
            return factorization
        shapes = kind_of(factorization).shapes(site.geometry, factorization, site.bias is not None)
        before, after = site_params(site), chain_params(shapes)
        if after >= before:
            return Keep(f"no gain: ranks {_text(factorization)} would take {after:,} parameters instead of {before:,}")
        macs_before, macs_after = site_macs(site), chain_macs(shapes, site.calls)
        if macs_before is not None and macs_after is not None and macs_after >= macs_before:
            return Keep(f"no gain: ranks {_text(factorization)} would take {macs_after:,} MACs instead of {macs_before:,}")
        return factorization


def draw(sites: Sequence[Site], ranks: Any, options: Options, progress: Callable[[Site], None] | None = None) -> Drawn:
    """The plan that ``ranks`` and ``options`` make for these sites.

    Raises:
        SurgeryValueError, SurgeryTypeError: a request that means nothing, names no layer, or asks for what cannot be done.
    """
    request = parse_ranks(ranks)
    table = None
    if isinstance(request, Plan):
        table = Names("ranks (the plan)", dict(request.items()), sites)
    elif isinstance(request, Mapping):
        table = Names("ranks", request, sites, linear_too=options.method == "svd")
    draft = _Draft(
        options=options,
        rule=request if table is None else None,  # type: ignore[arg-type]
        table=table,
        replay=isinstance(request, Plan),
        include=None
        if options.include is None
        else Names("include", as_names("include", options.include), sites, linear_too=options.method == "svd"),
        exclude=None if options.exclude is None else Names("exclude", as_names("exclude", options.exclude), sites, linear_too=True),
    )
    plan = Plan()
    for site in sites:
        if progress is not None:
            progress(site)
        plan[site.name] = draft.decide(site)
    return Drawn(plan, draft.spectra)


def _as_ranks(value: Any, kind: Kind, what: str, *, zero: bool = False) -> list[int | None]:
    """One rank a mode: an int where the kind has one mode, else a sequence of ints and None."""
    modes = kind.modes
    name = kind.factorization.kind
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value]
    if isinstance(value, str | bytes) or not isinstance(value, Sequence) or len(value) != len(modes):
        expected = "an int" if len(modes) == 1 else f"{len(modes)} ranks ({', '.join('rank_' + m for m in modes)})"
        raise SurgeryTypeError(f"{what}: {name} takes {expected}, a fraction, a factorization or None, got {value!r}")
    least = 0 if zero else 1
    for rank in value:
        if rank is None and len(modes) > 1:
            continue
        if not isinstance(rank, int) or isinstance(rank, bool):
            raise SurgeryTypeError(f"{what}: a rank is an int, got {rank!r}")
        if rank < least:
            raise SurgeryValueError(f"{what}: a rank is at least {least}, got {rank}")
    return list(value)


def _check_range(ranks: Sequence[int | None], kind: Kind, site: Site, what: str) -> None:
    for mode, rank, full in zip(kind.modes, ranks, kind.full_ranks(site.geometry), strict=True):
        if rank is not None and rank > full:
            raise SurgeryValueError(f"{what}: rank {rank} of mode {mode!r} of {site} ({site.geometry}) is above its full rank {full}")
    if all(rank is None for rank in ranks):
        raise SurgeryValueError(f"{what}: no mode is cut; to keep the layer give None")


def _clip(site: Site, factorization: Factorization) -> Factorization:
    """The factorization with its ranks clipped to what its chain can use, where the kind and its ranges allow it at all."""
    if refusal_of(site, factorization) is not None:
        return factorization
    return kind_named(factorization.kind).from_ranks(site.geometry, factorization.ranks)


def _text(factorization: Factorization) -> str:
    return "(" + ", ".join("full" if r is None else str(r) for r in factorization.ranks) + ")"
