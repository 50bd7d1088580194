"""From a request to a plan: every site gets a factorization or a reason to be kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from passes import host_for
from passes.blockwise import Blockwise
from passes.decompose import ALREADY
from passes.errors import SurgeryValueError
from passes.factorization import Decision, Factorization, Keep
from passes.kinds import all_kinds, kind_named, kind_of, usual_kind
from passes.running import callers_code
from passes.site import Site, for_all_tied
from passes.spectra import Spectra
from surgery.cost import macs_under, params_under, site_macs
from surgery.fitting import learn, usable_batches
from surgery.inspection import check_not_quantized, look, totals_of
from surgery.options import AUTO, Options, runtime_of
from surgery.plan import Plan
from surgery.progress import tracked
from surgery.ranks.asked import as_answered, as_asked, no_gain
from surgery.ranks.budget import Budget, Totals
from surgery.ranks.request import Named, Names, as_names, parse_ranks
from surgery.ranks.rules import Energy, Evbmf, Fraction, Rule, Stable

if TYPE_CHECKING:
    from surgery.calibration import Calibration
    from surgery.cost.outcome import LatencyOutcome
    from surgery.latency import Stopwatch, Terms
    from surgery.latency.families import Solved
    from surgery.latency.table import Table
    from surgery.ranks.candidates import Candidates, Pays

__all__ = ["Draft", "check_answerable"]

NOTHING = Totals()
OF_SPECTRA = (Energy, Evbmf, Fraction, Stable)  # rules of one's own may answer without
NO_SPECTRA = 'method: {!r} has no spectra that a rank rule could look at; give its ranks by name, for example ranks={{"re:.*conv.*": 16}}'


class Draft(Mapping[str, Decision]):
    """A plan in the making: for every site a factorization or a reason to keep it.

    What needs no look at the weights is decided at once; what a rule decides is decided when it is first asked for, so that a site's spectra
    need to be held only from then until it is cut.

    Args:
        sites: of the model.
        ranks: the request, as ``surgery.decompose`` takes it.
        options: everything else that decides.
        totals: what the network takes, for budgets.
        learn: tells what matters in the weights of layers, called once, with those that may be cut (second moments of others' inputs could take
            gigabytes for nothing); None where their numbers alone decide.
        stopwatch: what times the model, for latency budgets and ``guard="latency"``.

    Raises:
        SurgeryValueError, SurgeryTypeError: a request that means nothing, names no layer, or asks for what cannot be done; here, or when a
            rule's answer is asked for.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        ranks: Any,
        options: Options,
        totals: Totals = NOTHING,
        *,
        learn: Callable[[Sequence[Site]], Calibration] | None = None,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        request = parse_ranks(ranks)
        check_answerable(request, options.method, inputs=True)  # a budget says itself what it lacks
        self._stopwatch = stopwatch
        if runtime_of(options.guard) is not None and (stopwatch is None or stopwatch.example_inputs is None):
            raise SurgeryValueError(f'guard: "{options.guard}" needs example_inputs: without them there is nothing to time')
        linear_too = options.method == "svd"
        self._options, self.totals = options, totals
        self.candidates: list[Candidates] = []  # what a budget chose from
        self._tied = {site.name: site for site in sites if site.tied_to is not None}
        self.all_sites = tuple(sites)
        sites = [for_all_tied(site, sites) for site in sites if site.tied_to is None]
        self._sites = {site.name: site for site in sites}
        self._replay = isinstance(request, Plan)
        self._table: Names | None = None
        self._rule: Rule | None = None
        self._own: dict[str, Rule] = {}  # rules that a table gives single layers
        if isinstance(request, Plan):
            self._table = Names("ranks (the plan)", dict(request.items()), sites)
        elif isinstance(request, Mapping):
            self._table = Names("ranks", request, sites, linear_too=linear_too)
        elif not isinstance(request, Budget):
            self._rule = request
        if self._replay and not request and sites:
            raise SurgeryValueError(f"ranks: the plan is empty, but the model has {len(sites)} layers; make it by surgery.plan, or name some of them")
        included = None if options.include is None else as_names("include", options.include)
        if included == {}:
            raise SurgeryValueError("include: it names no layer; leave it out to have all looked at")
        self._include = None if included is None else Names("include", included, sites, linear_too=linear_too)
        self._exclude = None if options.exclude is None else Names("exclude", as_names("exclude", options.exclude), sites, linear_too=True)
        self._decided = {site.name: decision for site in sites if (decision := self._at_once(site)) is not None}
        decisions = [(site, self._decided.get(site.name)) for site in sites]
        wanted = [(s, self._kind(s) if d is None else kind_of(d)) for s, d in decisions if d is None or isinstance(d, Factorization)]
        names = {site.name for site, _ in wanted}
        learnt = None if learn is None else learn([site for site in self.all_sites if site.name in names or site.tied_to in names])
        self._calibrated = learnt is not None
        self.examples = 0 if learnt is None else learnt.examples  # of calibration
        self.spectra = Spectra(wanted, options.device, metrics=None if learnt is None else learnt.metrics)
        if isinstance(request, Budget):
            self._decided |= self._by_budget(request)

    @classmethod
    def of(cls, model: nn.Module, ranks: Any, options: Options, example_inputs: Any, calibration: Any) -> Draft:
        """The draft for a model, which is not touched."""
        from surgery.latency import Stopwatch

        seen = look(model, example_inputs)
        sites = host_for(model, observed=seen.observed, effective_weights=options.effective_weights).sites()
        check_not_quantized(model, sites)
        learning = None if calibration is None else partial(learn, model, usable_batches(model, calibration))
        return cls(sites, ranks, options, totals_of(model, seen), learn=learning, stopwatch=Stopwatch(model, example_inputs))

    @property
    def latency(self) -> LatencyOutcome | None:
        """What a latency budget came to."""
        return None if self._stopwatch is None else self._stopwatch.outcome

    def __getitem__(self, name: str) -> Decision:
        tied = self._tied.get(name)
        first = self._sites[name if tied is None or tied.tied_to is None else tied.tied_to]
        if first.name not in self._decided:
            self._decided[first.name] = self._by_rule(first)
        decision = self._decided[first.name]
        if tied is not None and tied.keep is not None and decision == Keep(first.keep or tied.keep):
            return Keep(tied.keep)  # in its own words
        return decision

    def __iter__(self) -> Iterator[str]:
        return (site.name for site in self.all_sites)

    def __len__(self) -> int:
        return len(self.all_sites)

    def _kind(self, site: Site) -> Blockwise:
        return usual_kind(site.geometry, "tucker" if self._options.method == AUTO else self._options.method)

    def _at_once(self, site: Site) -> Decision | None:
        """The decision, or None where a rule has to look at the weight first."""
        named = None if self._table is None else self._table.find(site)
        included = None if self._include is None else self._include.find(site)
        if self._exclude is not None and self._exclude.find(site) is not None:
            return Keep("excluded")
        if self._include is not None and included is None:
            return Keep("not included")
        if site.chain is not None and named is None:
            return Keep(ALREADY)
        if self._table is None:
            return self._ruled_out(site, included)
        if named is None:
            return Keep("not in the plan" if self._replay else "not named")
        if callable(named.value):
            self._own[site.name] = named.value
            ruled_out = self._ruled_out(site, named)
            if ruled_out is None and isinstance(named.value, OF_SPECTRA) and not self._kind(site).has_spectra:
                raise SurgeryValueError(NO_SPECTRA.format(self._options.method))
            return ruled_out
        return as_asked(site, self._kind(site), named)

    @property
    def _naming(self) -> str:
        """The argument that names single layers."""
        return "include" if self._table is None else "ranks"

    def _ruled_out(self, site: Site, included: Named | None) -> Keep | None:
        """Why a rule is not asked about this site, or None where it is."""
        if site.keep is not None:
            if included is not None and included.exact:
                raise SurgeryValueError(f"{self._naming}: {included.key!r} cannot be cut: {site.keep}")
            return Keep(site.keep)
        if site.geometry.is_linear and included is None and self._options.method != "svd":
            return Keep("linear layers are cut only where they are named")
        reason = self._kind(site).refuses(site.geometry)
        if reason is not None and included is not None and included.exact:
            raise SurgeryValueError(f"{self._naming}: {included.key!r} cannot be cut: {reason}")
        if reason is None and all(each.calls == () for each in (site, *site.others)):
            reason = "the example inputs do not reach it"
        return None if reason is None else Keep(reason)

    def _by_budget(self, budget: Budget) -> dict[str, Decision]:
        """All layers that are not decided yet, at once."""
        free = [site for site in self._sites.values() if site.name not in self._decided]
        unseen = [site for site in free if self._calibrated and site.name not in self.spectra.metrics]
        if unseen:  # its errors would have another unit than the others'
            kept = {site.name: Keep("the calibration batches do not reach it") for site in unseen}
            return {**kept, **self._by_budget_of(budget, [site for site in free if site.name not in kept])}
        return self._by_budget_of(budget, free)

    def _by_budget_of(self, budget: Budget, free: Sequence[Site]) -> dict[str, Decision]:
        from surgery.ranks.solve import solve

        if budget.latency is not None:
            return self._by_latency(budget, free)
        unit = budget.unit or ("macs" if self.totals.macs is not None else "params")
        if getattr(self.totals, unit) is None:
            raise SurgeryValueError(f"ranks: {budget} needs example_inputs: without them MACs are not known")
        tables = self._paying(free)
        self.candidates = []
        for site in tracked(free, "choosing for", name=str):
            self.candidates.append(self._candidates(site, unit, tables.get(site.name)))
            self.spectra.let_go(site)
        try:
            return solve(budget, self.candidates, self.totals)
        except SurgeryValueError as error:
            slow = sum(all(isinstance(decision, Keep) for decision in c.decisions) for c in self.candidates)
            if not tables or not slow:
                raise
            raise SurgeryValueError(f"{error}; of {slow} layers no chain was measured faster (guard={self._options.guard!r})") from error

    def _candidates(self, site: Site, unit: str, table: Table | None) -> Candidates:
        """What could be done with a layer; under a guard by time only what pays, at ranks that are measured."""
        from surgery.ranks.candidates import candidates_of

        costs = {"macs": partial(macs_under, site), "params": partial(params_under, site)}
        lower = [] if self._options.guard != "macs" else [c for name, c in costs.items() if name != unit and (name == "params" or site_macs(site))]
        shared: dict[str, Any] = {"cost": costs[unit], "guards": lower, "keep": Keep("the budget is better spent on other layers")}
        if table is None:
            return candidates_of(site, self._kinds_for(site), self.spectra, round_to=self._options.round_to, **shared)
        found = candidates_of(site, self._kinds_for(site), self.spectra, round_to=table.step, pays=table.pays, **shared)
        from surgery.latency.solving import no_faster, nothing_to_cut

        return replace(found, decisions=(no_faster(runtime_of(self._options.guard) or ""),)) if nothing_to_cut(found) else found

    def _paying(self, free: Sequence[Site]) -> Mapping[str, Table]:
        """For a guard by measured time, the times of all chains of these layers, by name."""
        runtime = runtime_of(self._options.guard)
        if runtime is None or self._stopwatch is None:
            return {}
        return self._stopwatch.tables(free, self._kinds_for, runtime, self._options.round_to)

    def cost_of(self, site: Site, decision: Decision) -> int:
        """MACs of a layer under a decision, or parameters where MACs are not known."""
        count = params_under if self.totals.macs is None else macs_under
        return count(site, decision if isinstance(decision, Factorization) else None)

    def _by_latency(self, budget: Budget, free: Sequence[Site]) -> dict[str, Decision]:
        if self._stopwatch is None:
            raise SurgeryValueError(f"ranks: {budget} needs the model and its example_inputs: without them there is nothing to time")
        tables = self._paying(free)
        return self._stopwatch.decide(budget, free, self._terms(lambda site: tables[site.name].pays if tables else None))

    def choices_by_time(self, runtime: str) -> Solved:
        """What could be done with the layers that a budget chose from, by measured time in a runtime.

        Raises:
            SurgeryValueError: no example inputs.
            MissingExtra: the runtime is not installed.
        """
        if self._stopwatch is None:
            raise SurgeryValueError("latency: needs the model and its example_inputs: without them there is nothing to time")
        return self._stopwatch.choices(Budget(latency=0.5, runtime=runtime), [each.site for each in self.candidates], self._terms())

    def _terms(self, pays: Callable[[Site], Pays | None] = lambda site: None) -> Terms:
        from surgery.latency import Terms

        guards = partial(_macs_and_params, guard=self._options.guard)
        return Terms(kinds=self._kinds_for, spectra=self.spectra, guards=guards, round_to=self._options.round_to, pays=pays)

    def _kinds_for(self, site: Site) -> Sequence[Blockwise]:
        return all_kinds() if self._options.method == AUTO else [self._kind(site)]

    def _by_rule(self, site: Site) -> Decision:
        kind = self._kind(site)
        rule: Any = self._own.get(site.name, self._rule)
        spectra = self.spectra.of(site, kind)
        with callers_code(f"ranks: the rank rule fails for {site}"):
            answer = rule(site, spectra)
        decision = as_answered(site, kind, answer, self._options.round_to)
        if isinstance(decision, Factorization):
            decision = self._guard(site, decision)
        if isinstance(decision, Factorization) and self._options.method == AUTO and not isinstance(answer, Factorization):
            from surgery.ranks.auto import best_kind

            better = self._guard(site, best_kind(site, decision, self.spectra, self._options.round_to))
            return decision if isinstance(better, Keep) else better  # by error alone it may be a kind that is slow
        return decision

    def _guard(self, site: Site, factorization: Factorization) -> Decision:
        if self._options.guard == "none":
            return factorization
        runtime = runtime_of(self._options.guard)
        if runtime is not None and self._stopwatch is not None:
            return self._stopwatch.pays(site, factorization, runtime) or factorization
        return no_gain(site, factorization) or factorization


def check_answerable(request: Any, method: str, *, inputs: bool) -> None:
    """Refuse ranks for which no network has an answer under a method, or without example inputs.

    Raises:
        SurgeryValueError: a rule or a budget for a kind without spectra, or a budget of MACs or time without inputs.
    """
    if isinstance(request, Mapping):  # a plan too
        return
    if method != AUTO and not kind_named(method).has_spectra:
        raise SurgeryValueError(NO_SPECTRA.format(method))
    if not inputs and isinstance(request, Budget) and (request.macs is not None or request.latency is not None):
        lacking = "there is nothing to time" if request.latency is not None else "MACs are not known"
        raise SurgeryValueError(f"ranks: {request} needs example_inputs: without them {lacking}")


def _macs_and_params(site: Site, guard: str) -> list[Callable[[Factorization | None], int]]:
    """Costs that a chain chosen by time must lower as well."""
    return [] if guard != "macs" else [partial(macs_under, site), partial(params_under, site)]
