"""Cutting again what was cut before: a plan for layers as one for the chains that stand in their place."""

from __future__ import annotations

from torch import nn

from passes import host_for
from passes.decompose import ALREADY
from passes.factorization import Factorization, Keep
from passes.kinds import kind_of
from passes.site import Site
from surgery.plan import Plan

__all__ = ["onto", "plan_of"]


def plan_of(model: nn.Module) -> Plan:
    """The chains that are in a model."""
    return Plan({site.name: site.chain for site in host_for(model).sites() if site.chain is not None})


def onto(model: nn.Module, chosen: Plan) -> Plan:
    """A plan for layers as one for the model with the chains that it has: these are cut again where ranks are lower, and stay otherwise."""
    return Plan({site.name: _again(site, chosen[site.name]) for site in host_for(model).sites() if site.name in chosen})


def _again(site: Site, wanted: Factorization | Keep) -> Factorization | Keep:
    if site.chain is None:
        return wanted
    if isinstance(wanted, Keep) or wanted == site.chain:
        return Keep(ALREADY)
    if wanted.kind != site.chain.kind:
        return wanted
    ranks = [had if rank is None else rank if had is None else min(had, rank) for had, rank in zip(site.chain.ranks, wanted.ranks, strict=True)]
    lower = kind_of(wanted).from_ranks(site.geometry, ranks)
    return Keep(ALREADY) if lower == site.chain else lower
