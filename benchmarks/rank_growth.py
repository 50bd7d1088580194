"""How many parameters would each rule leave, had the network been cut after this epoch? Elhoushi et al. 2019 saw EVBMF's grow with training.

    python benchmarks/rank_growth.py RUN [--out FILE]

RUN is the folder of an ``original`` run of ``train_cifar.py`` or ``train_all.py`` with kept checkpoints (``--keep-every 5``); the weights at random,
epoch 0, are made from its seed. For each checkpoint and rule: parameters after the cut, and every layer's share of its full ranks (the geometric mean
of its modes), to see which layers grow; and how much of the random start each layer still holds, with the parameters that EVBMF would leave without
it. The picture has the paper's networks as crosses.
Checkpoints that are in FILE (``benchmarks/results/rank_growth_NETWORK.json`` by default) are not looked at again; a FILE is of one run.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from training.checkpoint import LAST, LATER, read_run
from training.paper import TABLES
from training.recipe import Recipe, fresh_network
from training.scenario import Scenario

import surgery
from passes import host_for
from passes.factorization import Factorization
from passes.kinds import kind_of
from surgery.zoo import load_weights

RESULTS = Path(__file__).parent / "results"
WITHOUT = "evbmf without the start"
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
EVBMF = "evbmf"
NOT_OF_THE_NETWORK = {"environment", "threads", "memory_kept", LATER, "label"}  # of what run.json tells
RULES = (EVBMF, "evbmf:weaken=0.5", "energy:0.8", "energy:0.9", "stable", 0.5)


def networks(run: Path) -> Iterator[tuple[int, nn.Module]]:
    """Epoch and network of each checkpoint of a run, the random weights first."""
    facts = read_run(run)
    recipe = Recipe(network=facts["network"], epochs=facts["epochs"], seed=facts["seed"])
    yield 0, fresh_network(recipe)
    for file in [*sorted(run.glob("epoch-*.pt"), key=epoch_of), run / LAST]:
        model = fresh_network(recipe)
        load_weights(model, file)
        yield epoch_of(file), model


def epoch_of(file: Path) -> int:
    if file.name == LAST:
        return int(torch.load(file, map_location="cpu", weights_only=True)["epoch"])
    return int(file.stem.removeprefix("epoch-"))


def look(model: nn.Module, rule: Any) -> dict[str, Any]:
    """Parameters that a rule leaves, and the share of its full ranks that it leaves each layer."""
    net = surgery.decompose(model, rule)
    chains = {site.name: site for site in host_for(net).sites() if site.chain is not None}
    return {
        "parameters": sum(p.numel() for p in net.parameters()),
        "shares": {name: share(site.geometry, site.chain) for name, site in chains.items() if site.chain is not None},
    }


def share(geometry: Any, chain: Factorization) -> float:
    full = kind_of(chain).full_ranks(geometry)
    return prod((most if rank is None else rank) / most for rank, most in zip(chain.ranks, full, strict=True)) ** (1 / len(full))


def start_left(model: nn.Module, start: nn.Module) -> dict[str, float]:
    """For each convolution the share of its random weights that its weights still hold: their projection on them, 1 where both are the same."""
    first = {name: module.weight.detach() for name, module in start.named_modules() if isinstance(module, CONVOLUTIONS)}
    now = {name: model.get_submodule(name).weight.detach() for name in first}
    return {name: float((now[name] * weight).sum() / weight.square().sum()) for name, weight in first.items()}


def without_start(model: nn.Module, start: nn.Module) -> nn.Module:
    """The network with what it holds of its random weights taken from each convolution."""
    bare = copy.deepcopy(model)
    with torch.no_grad():
        for name, left in start_left(model, start).items():
            bare.get_submodule(name).weight.sub_(left * start.get_submodule(name).weight)
    return bare


def known(file: Path, run: dict[str, Any]) -> dict[str, Any]:
    """What a file holds already of the run with these facts. What it does not tell of its run is not compared, nor added: it may be of another one.

    Raises:
        SurgeryValueError: it is of another run.
    """
    facts = {name: value for name, value in run.items() if name not in NOT_OF_THE_NETWORK}
    if not file.exists():
        return {"run": facts, "start_left": {}, "rows": []}
    found: dict[str, Any] = json.loads(file.read_text())
    before = found.get("run", {})
    other = [f"{name} {before[name]!r}, not {value!r}" for name, value in facts.items() if name in before and before[name] != value]
    if other:
        raise surgery.SurgeryValueError(f"{file}: is of a run with {', '.join(other)}; give another --out, or remove it")
    return found


def draw(network: str, found: dict[str, Any], file: Path) -> None:
    """Parameters by epoch, a line a rule, the paper's, cut by EVBMF, as crosses; beside it what is left of the random start, a line a layer."""
    from matplotlib.figure import Figure

    rows, left = found["rows"], found["start_left"]
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    axes, beside = figure.subplots(1, 2, sharex=True)
    for rule in dict.fromkeys(row["rule"] for row in rows):
        mine = sorted((row["epoch"], row["parameters"]) for row in rows if row["rule"] == rule)
        axes.plot(*zip(*mine, strict=True), "o-", markersize=3, label=rule)
    paper = [(Scenario.parse(name).decompose_at, row.parameters) for name, row in TABLES.get(network, {}).items()]
    cut = [
        (epoch, parameters) for (epoch, parameters), name in zip(paper, TABLES.get(network, {}), strict=True) if epoch and "reconstruct" not in name
    ]
    if cut:
        axes.plot(*zip(*cut, strict=True), "kx", label="evbmf in the paper")
    axes.set(xlabel="epochs before the cut", ylabel="parameters after it", title=network, ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    layers = list(next(iter(left.values())))
    for number, name in enumerate(layers):
        shade = str(0.8 - 0.8 * number / len(layers))
        beside.plot([int(epoch) for epoch in left], [by[name] for by in left.values()], color=shade, linewidth=1)
    beside.set(xlabel="epochs", ylabel="share of a layer's random start that is left", title="light: first layers; dark: last", ylim=(0, None))
    beside.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of one original run")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/rank_growth_NETWORK.json")
    options = parser.parse_args(arguments)
    if not (options.run / LAST).exists() or read_run(options.run)["scenario"] != str(Scenario()):
        parser.error(f"{options.run} is not the folder of an original run with checkpoints")
    network = read_run(options.run)["network"].rpartition(":")[2]
    out = options.out or RESULTS / f"rank_growth_{network}.json"
    try:
        found = known(out, read_run(options.run))
    except surgery.SurgeryError as error:
        raise SystemExit(f"{parser.prog}: {error}") from error
    rows = found["rows"]
    start = None
    for epoch, model in networks(options.run):
        start = start or model
        found["start_left"][str(epoch)] = start_left(model, start)
        cuts: list[tuple[str, nn.Module, Any]] = [(str(rule), model, rule) for rule in RULES]
        if model is not start:
            cuts.append((WITHOUT, without_start(model, start), EVBMF))
        for name, looked_at, rule in cuts:
            if any((row["epoch"], row["rule"]) == (epoch, name) for row in rows):
                continue
            rows.append({"epoch": epoch, "rule": name} | look(looked_at, rule))
            out.parent.mkdir(exist_ok=True)
            out.write_text(json.dumps(found, indent=1) + "\n")
            print(json.dumps({key: value for key, value in rows[-1].items() if key != "shares"}), flush=True)
    draw(network, found, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
