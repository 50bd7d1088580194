"""The time of a training step, forward and backward, of the whole network: cuts that together do not shorten it are taken back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from passes import host_for, observe
from passes.factorization import Decision, Factorization, Keep
from passes.site import Site
from surgery.benchmark import benchmark
from surgery.latency import Stopwatch, with_noise
from surgery.plan import Plan
from surgery.training.deeper import onto, plan_of

__all__ = ["never_slower"]

REPEATS = 15
KEPT = "the training step of the whole network was not measured faster with it"


def never_slower(now: nn.Module, whole: nn.Module, plan: Plan, example_inputs: Any) -> Plan:
    """The plan, without the cuts that save least where the step is not measured faster with all of them.

    The network as it is now and the network that the plan would make run in turn, in train mode, on the same inputs. Where the median ratio of their
    times is not above 1 beyond noise, the half of the cuts that save least by the times of their layers alone is taken back, and so on. What is a
    chain already stays the chain that it is where its cut is taken back.

    Args:
        now: the network that is trained; not touched.
        whole: the same without chains, for which the plan is.
        plan: what is wanted.
        example_inputs: a batch as in training, in its memory format.

    Returns:
        A plan whose step was measured faster than that of ``now``, or one that cuts nothing.
    """
    stay = plan_of(whole)  # that could not be fused: hooks hang on their layers, say
    chains = {name: chain for name, chain in plan_of(now).items() if name not in stay}
    asked = onto(now, plan)
    cuts = {name: decision for name, decision in asked.items() if isinstance(decision, Factorization)}
    if not cuts:
        return plan
    sites = host_for(whole, observed=observe(whole, example_inputs), effective_weights=True).sites()
    first = {site.name: site.tied_to or site.name for site in sites}  # layers with one weight are cut together, or not
    saved = _saved(Stopwatch(whole, example_inputs), sites, cuts, chains)
    left = sorted(dict.fromkeys(first[name] for name in cuts), key=lambda name: -saved.get(name, 0.0))
    while left:
        wanted: Mapping[str, Decision] = {**chains, **{name: decision for name, decision in cuts.items() if first[name] in left}}
        (row,) = benchmark(now, with_noise(whole, wanted), example_inputs, runtimes=("train",), repeats=REPEATS).rows
        if row.verdict == "faster":
            break
        left = left[: len(left) // 2]
    return Plan({name: Keep(KEPT) if name in cuts and first[name] not in left else decision for name, decision in plan.items()})


def _saved(stopwatch: Stopwatch, sites: Sequence[Site], cuts: Mapping[str, Decision], chains: Mapping[str, Decision]) -> dict[str, float]:
    """Seconds of a step that each cut saves, by layers and chains timed on their own; for layers with one weight in all, by the name of the first.

    Args:
        stopwatch: of the network without chains.
        sites: of that network.
        cuts: the chains that are wanted.
        chains: those that stand there now.
    """
    saved: dict[str, float] = {}
    for site in sites:
        decision, chain = cuts.get(site.name), chains.get(site.name)
        if isinstance(decision, Factorization) and site.calls:
            before, after = stopwatch.times(site, decision, "train")
            if isinstance(chain, Factorization):
                _, before = stopwatch.times(site, chain, "train")
            name = site.tied_to or site.name
            saved[name] = saved.get(name, 0.0) + before.seconds - after.seconds
    return saved
