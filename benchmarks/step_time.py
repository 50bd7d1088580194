"""How much faster is a training step, forward and backward, at no more parameters than the paper's networks had after their cut?

    python benchmarks/step_time.py [--only NAME ...] [--repeats 30] [--threads N] [--plan FILE] [--again]

Original and decomposed network in channels-last format, called in turn (``surgery.benchmark(runtimes=["train"])``), random weights: time does not
depend on them. The parameters are those of Elhoushi et al. 2019, tables 1 to 4. The plan of a network is made by a budget, a share of the MACs, with
ranks in multiples of 8; where that leaves too many parameters, each layer gets the lower ranks of it and of a budget of the parameters. Then cuts
that are not measured to save time are left out, those that lose most first, as far as the parameters allow. The plan is saved in
``benchmarks/results/step_time/`` and from then on it is what is timed, whatever ``--out`` says; ``--replan`` makes it anew, in the folder beside
``--out``. ``--plan FILE`` times a plan that a network was trained with instead: ``plan.json`` of its run.

A row a network and plan goes to ``--out`` (``benchmarks/results/step_time.json``); rows that are there for as many threads on this processor are not
measured again without ``--again``. The load average is kept with them: let nothing else run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import surgery
from passes import host_for, observe
from passes.factorization import Decision
from surgery import Budget, Factorization, Keep, Plan
from surgery.benchmark import environment
from surgery.cost import threads_set
from surgery.latency import Stopwatch
from surgery.zoo import make

RESULTS = Path(__file__).parent / "results" / "step_time.json"
ROUND_TO = 8


@dataclass(frozen=True, slots=True)
class Case:
    """What is timed: ``params`` are those that the paper's network had; ``macs`` is the share that is left of them."""

    batch: int
    size: int
    params: int
    macs: float


CASES: Mapping[str, Case] = {
    "surgery:vgg19": Case(128, 32, 749_000, 0.25),
    "surgery:resnet56": Case(128, 32, 508_000, 0.4),
    "surgery:densenet40": Case(128, 32, 270_000, 0.25),
    "torchvision:resnet50": Case(8, 224, 17_600_000, 0.5),
}


def plan_for(model: nn.Module, inputs: Tensor, case: Case) -> Plan:
    """Within the parameters and the share of MACs of a case, without cuts that cost time, as far as the parameters allow."""
    by_macs, by_params = (
        surgery.plan(model, budget, example_inputs=inputs[:1], round_to=ROUND_TO) for budget in (Budget(macs=case.macs), Budget(params=case.params))
    )
    small = parameters(surgery.decompose(model, by_macs)) <= case.params
    return without_losses(model, inputs, by_macs if small else lower_of(by_macs, by_params), case.params)


def lower_of(one: Plan, other: Plan) -> Plan:
    """The lower of two plans' ranks in each mode of each layer; both are of one kind a layer, and a layer is cut where either cuts it."""
    return Plan({name: _lower(one[name], other[name]) for name in one})


def _lower(one: Decision, other: Decision) -> Decision:
    if isinstance(one, Keep):
        return other
    if isinstance(other, Keep):
        return one
    ranks = [b if a is None else a if b is None else min(a, b) for a, b in zip(one.ranks, other.ranks, strict=True)]
    return type(one)(*ranks)


def without_losses(model: nn.Module, inputs: Tensor, plan: Plan, params: int) -> Plan:
    """The plan without cuts that are not measured to save time in a training step, those that lose most first, while the network stays this small."""
    stopwatch = Stopwatch(model, inputs)
    sites = {site.name: site for site in host_for(model, observed=observe(model, inputs)).sites()}
    losses = {}
    for name, decision in plan.items():
        if isinstance(decision, Factorization):
            before, after = stopwatch.times(sites[name], decision, "train")
            losses[name] = after.seconds - before.seconds
    for name in sorted((n for n, loss in losses.items() if loss > 0), key=lambda n: -losses[n]):
        whole = Plan({**plan, name: Keep("a cut at these ranks takes longer")})
        if parameters(surgery.decompose(model, whole)) <= params:
            plan = whole
    return plan


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def measure(name: str, case: Case, plan: Path, repeats: int, threads: int, replan: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = make(name)[0].to(memory_format=torch.channels_last)
    inputs = torch.randn(case.batch, 3, case.size, case.size).contiguous(memory_format=torch.channels_last)
    if replan or not plan.exists():
        plan.parent.mkdir(parents=True, exist_ok=True)
        plan_for(model, inputs, case).save(plan)
    net = surgery.decompose(model, Plan.load(plan), example_inputs=inputs[:1])
    found = surgery.benchmark(model, net, inputs, runtimes=("train",), repeats=repeats, threads=threads)
    (row,) = found.rows
    return {
        "network": name,
        "plan": told(plan),
        "batch": case.batch,
        "size": case.size,
        "parameters_before": parameters(model),
        "parameters": parameters(net),
        "paper_parameters": case.params,
        "layers_cut": sum(layer.status == "decomposed" for layer in surgery.report(net).layers),
        "macs_ratio": found.flops_ratio,
        "time_ratio": row.time_ratio,
        "time_ratio_low": row.time_ratio_low,
        "time_ratio_high": row.time_ratio_high,
        "before_ms": row.before_ms,
        "after_ms": row.after_ms,
        "threads": threads,
        "repeats": repeats,
        "load_average": os.getloadavg()[0],
        "environment": environment(),
    }


def told(plan: Path) -> str:
    """A plan's file with the folder that it is in: those of runs all bear one name."""
    return f"{plan.absolute().parent.name}/{plan.name}"


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells rows apart."""
    return row["network"], row["plan"], row["batch"], row["size"], row["threads"], row["environment"]["processor"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=CASES, default=list(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--repeats", type=int, default=30, help="pairs of samples (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, help="another one than the cases'")
    parser.add_argument("--plan", type=Path, help="a plan to time, for one network")
    parser.add_argument("--replan", action="store_true", help="make the plans anew")
    parser.add_argument("--again", action="store_true", help="measure rows that are there anew")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.plan is not None and len(options.only) != 1:
        parser.error("--plan is for one network: name it with --only")
    if options.plan is not None and options.replan:
        parser.error("--replan would write over the --plan")
    plans = (options.out if options.replan else RESULTS).with_suffix("")
    rows = {key(row): row for row in (json.loads(options.out.read_text()) if options.out.exists() else [])}
    for name in options.only:
        case = replace(CASES[name], batch=options.batch or CASES[name].batch)
        plan = options.plan or plans / f"{name.partition(':')[2]}.json"
        facts = {
            "network": name,
            "plan": told(plan),
            "batch": case.batch,
            "size": case.size,
            "threads": options.threads,
            "environment": environment(),
        }
        if key(facts) in rows and not (options.again or options.replan):
            continue
        with threads_set(options.threads):
            row = measure(name, case, plan, options.repeats, options.threads, options.replan)
        rows[key(row)] = row
        print(json.dumps(row), flush=True)
        options.out.parent.mkdir(exist_ok=True)
        options.out.write_text(json.dumps(list(rows.values()), indent=1) + "\n")


if __name__ == "__main__":
    main()
