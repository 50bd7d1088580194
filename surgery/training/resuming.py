"""A schedule where a run was cut off: its state as it is saved, and a fresh network brought to the architecture that it had."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from passes import host_for
from passes.errors import SurgeryValueError
from passes.factorization import Factorization
from passes.running import private_copy
from surgery.checkpoint import record_from_text, with_empty_chains
from surgery.plan import Plan
from surgery.reconstruct import reconstruct
from surgery.training.deeper import plan_of
from surgery.training.followers import Followers
from surgery.undoing import undone_on_error

__all__ = ["FORMAT", "VERSION", "read_state", "rebuild"]

FORMAT = "surgery.schedule"
VERSION = 1


def rebuild(followers: Followers, plan: Plan, *, whole_again: bool = False) -> None:
    """Give a model and its copies the chains of a plan, empty, and optimizers their slots, without state.

    Where they are all there already nothing is done: their numbers may have been loaded.
    """
    networks = (followers.model, *followers.copies)
    for network in networks:  # a plan that does not fit is refused before anything is changed
        fused = reconstruct(private_copy(network, share_parameters=True))
        with_empty_chains(fused, _lacking(fused, plan), Path("the schedule's state"))
    wanted = {name: decision for name, decision in plan.items() if isinstance(decision, Factorization)}
    if not whole_again and all(dict(plan_of(network)) == wanted for network in networks):
        return
    # gradients would be projected by numbers that are not there yet
    alone = Followers(model=followers.model, optimizers=followers.optimizers, gradients=False)

    def fuse(network: nn.Module) -> None:
        reconstruct(network, optimizer=list(alone.optimizers) or None if network is followers.model else None, state="reset", inplace=True)

    for network in networks:
        if plan_of(network):
            fuse(network)
    if whole_again and all(site.keep is None for network in networks for site in host_for(network).sites() if site.name in wanted):
        return  # plain layers stand where they are to stand, with whatever numbers they have
    held = alone.hold(host_for(followers.model, effective_weights=True).sites())
    with undone_on_error() as undo:
        for network in networks:
            with_empty_chains(network, _lacking(network, plan), Path("the schedule's state"), undo)
        alone.follow(held, host_for(followers.model).sites(), undo)
    for network in networks if whole_again else ():
        fuse(network)


def _lacking(network: nn.Module, plan: Plan) -> Plan:
    """What of a plan is not there yet: chains that cannot be fused, as hooks hang on their layers, stay what they are."""
    there = plan_of(network)
    return Plan({name: decision for name, decision in plan.items() if there.get(name) != decision})


def read_state(state: Any) -> dict[str, Any]:
    """The facts in a state dict, checked."""
    if not isinstance(state, Mapping) or state.get("format") != FORMAT:
        raise SurgeryValueError(f'schedule: expected what state_dict gave, a dict with "format": "{FORMAT}"')
    if state.get("version") != VERSION:
        raise SurgeryValueError(f"schedule: version {state.get('version')!r} is not one that this release reads ({VERSION})")
    fields: dict[str, Any] = {"cuts_done": int, "whole_again": bool, "plan": dict | None, "record": dict | None, "history": list}
    fields |= {"looked_at": int | None, "warmed_up": int, "gains": dict, "highest_rates": dict}
    for name, kind in fields.items():
        if name not in state or not isinstance(state[name], kind):
            raise SurgeryValueError(f"schedule: its field {name!r} is missing or damaged ({state.get(name)!r})")
    record = None if state["record"] is None else record_from_text(json.dumps(state["record"]), Path("the schedule's state"))
    return {**state, "plan": None if state["plan"] is None else Plan.from_data(state["plan"]), "record": record, "history": list(state["history"])}
