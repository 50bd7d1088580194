"""The time of a training step, forward and backward, of the whole network: cuts that together do not shorten it are taken back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from passes import host_for, observe
from passes.factorization import Decision, Factorization, Keep
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
    chains = plan_of(now)
    asked = onto(now, plan)
    cuts = [name for name, decision in asked.items() if isinstance(decision, Factorization)]
    if not cuts:
        return plan
    saved = _saved(whole, {name: asked[name] for name in cuts}, chains, example_inputs)
    left = sorted(cuts, key=lambda name: -saved.get(name, 0.0))
    while left:
        wanted: Mapping[str, Decision] = {**chains, **{name: asked[name] for name in left}}
        (row,) = benchmark(now, with_noise(whole, wanted), example_inputs, runtimes=("train",), repeats=REPEATS).rows
        if row.verdict == "faster":
            break
        left = left[: len(left) // 2]
    return Plan({name: Keep(KEPT) if name in cuts and name not in left else decision for name, decision in plan.items()})


def _saved(whole: nn.Module, cuts: Mapping[str, Decision], chains: Mapping[str, Decision], example_inputs: Any) -> dict[str, float]:
    """Seconds of a step that each cut saves, by layers and chains timed on their own. Cuts of tied layers go together.

    Args:
        whole: the network without chains.
        cuts: the chains that are wanted.
        chains: those that stand there now.
        example_inputs: a batch as in training.
    """
    stopwatch = Stopwatch(whole, example_inputs)
    saved: dict[str, float] = {}
    for site in host_for(whole, observed=observe(whole, example_inputs), effective_weights=True).sites():
        decision, chain = cuts.get(site.name), chains.get(site.name)
        if isinstance(decision, Factorization) and site.calls:
            before, after = stopwatch.times(site, decision, "train")
            if isinstance(chain, Factorization):
                _, before = stopwatch.times(site, chain, "train")
            saved[site.name] = before.seconds - after.seconds
            if site.tied_to is not None:
                saved[site.name] = saved[site.tied_to] = saved[site.name] + saved.get(site.tied_to, 0.0)
    return saved
