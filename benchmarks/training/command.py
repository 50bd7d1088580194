"""The command line that ``train_cifar.py`` and ``train_imagenet.py`` share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from surgery import SurgeryError
from surgery.cli.arguments import parse_ranks_text
from training.data import Pictures
from training.engine import Diverged, run
from training.recipe import Recipe
from training.scenario import Scenario, branch_points, usual

__all__ = ["add_arguments", "recipes", "train"]


def add_arguments(parser: argparse.ArgumentParser, defaults: Recipe) -> None:
    """All of a recipe, the scenarios, and where to."""
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of the pictures")
    add("--out", type=Path, required=True, help="folder of all runs: checkpoints, logs, reports")
    add("--network", default=defaults.network, help="surgery:NAME, torchvision:NAME, ...; always begun with random weights (default: %(default)s)")
    add("--scenarios", nargs="+", metavar="NAME", help="original, decompose-N[-deeper-L][-reconstruct-M], after-F (default: the paper's)")
    add("--seeds", nargs="+", type=int, default=[defaults.seed])
    add("--label", default="", help="part of the names of runs that cut, to tell ways of cutting apart")
    add("--keep-every", type=int, metavar="K", help="keep the checkpoint of each Kth epoch, for rank_growth.py")
    add("--epochs", type=int, default=defaults.epochs, help="of the original's run (default: %(default)s)")
    add("--batch", type=int, default=defaults.batch, help="pictures a step (default: %(default)s)")
    add("--rate", type=float, default=defaults.rate, help="of learning, at first (default: %(default)s)")
    add("--drops", nargs="*", type=float, default=defaults.drops, help="shares of the run after which the rate is a tenth (default: %(default)s)")
    add("--weight-decay", type=float, default=defaults.weight_decay, help="default: %(default)s")
    add("--subset", type=int, help="so many training pictures only")
    add("--device", default=defaults.device, help="default: %(default)s")
    add("--bf16", action="store_true", help="forward passes in bfloat16 by autocast; a cut is planned and timed in float32")
    add("--compile", dest="compiled", action="store_true", help="torch.compile of the network, before and after the cut")
    add("--contiguous", dest="channels_last", action="store_false", help="pictures and weights not in channels-last format")
    add("--threads", type=int, help="of torch (default: its own choice)")
    told = f"as for surgery decompose; two where a scenario cuts twice, one that cuts once takes the last (default: {defaults.ranks})"
    add("--ranks", nargs="+", type=parse_ranks_text, default=[defaults.ranks], help=told)
    add("--method", default=defaults.method, help="default: %(default)s")
    add("--guard", default=defaults.guard, help="step, macs, latency or none (default: step, where the ranks allow it)")
    add("--round-to", type=int, default=defaults.round_to, help="default: %(default)s")
    add("--decay", choices=["each", "product"], default=defaults.decay, help="default: %(default)s")
    add("--unbalanced", dest="balanced", action="store_false", help="factors as they come from the cut")
    add("--chain-rate", type=_share, default=defaults.chain_rate, metavar="SHARE", help="of the rate, for factors (default: %(default)s)")
    add("--warm-up", type=int, default=defaults.warm_up, metavar="STEPS", help="default: %(default)s")
    add("--batch-norm", type=int, default=defaults.batch_norm, metavar="BATCHES", help="take statistics anew after the cut")
    add("--calibration", type=int, default=defaults.calibration, metavar="BATCHES", help="factors that fit what the layers see")


def _share(text: str) -> float | str:
    return text if text == "auto" else float(text)


def recipes(options: argparse.Namespace) -> list[Recipe]:
    """One for each seed."""
    names = {name for name in Recipe.__dataclass_fields__ if hasattr(options, name)}
    ranks = options.ranks if len(options.ranks) > 1 else options.ranks[0]
    values = {name: getattr(options, name) for name in names} | {"drops": tuple(options.drops), "ranks": ranks}
    return [Recipe(**values, seed=seed) for seed in options.seeds]


def train(options: argparse.Namespace, pictures: Pictures) -> None:
    """All scenarios for all seeds, one after the other; each new row is printed."""
    names = options.scenarios or usual(options.network, options.epochs)
    scenarios = sorted((Scenario.parse(name) for name in names), key=order)
    for scenario in scenarios:  # all of them, before one is trained
        scenario.check(options.epochs)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    for scenario in scenarios:  # options of the cut that mean nothing are refused here
        recipes(options)[0].schedule(scenario, pictures)
    for recipe in recipes(options):
        run_all(recipe, scenarios, pictures, options.out, label=options.label, keep_every=options.keep_every)


def run_all(recipe: Recipe, scenarios: Sequence[Scenario], pictures: Pictures, out: Path, *, label: str = "", keep_every: int | None = None) -> None:
    """All scenarios of one recipe, those first from which others go on."""
    points = branch_points(scenarios, recipe.epochs)
    for scenario in scenarios:
        each = range(keep_every, scenario.length(recipe.epochs) + 1, keep_every) if keep_every else ()
        keep = {*points.get(scenario, ()), *each}
        run(recipe, scenario, pictures, out, label=label, keep=keep, tell=teller(recipe, scenario))


def teller(recipe: Recipe, scenario: Scenario) -> Callable[[dict[str, Any]], None]:
    """Prints rows."""
    return lambda row: print(json.dumps({"network": recipe.network, "scenario": str(scenario), "seed": recipe.seed} | row), flush=True)


def order(scenario: Scenario) -> tuple[bool, bool, int]:
    """Originals first, then those that only decompose."""
    return scenario != Scenario(), scenario.reconstruct_at is not None or scenario.fine_tune is not None, scenario.decompose_at or 0


def main(parser: argparse.ArgumentParser, pictures: Callable[[argparse.Namespace], Pictures]) -> None:
    """Read the arguments and train; what cannot be done is said in one line."""
    options = parser.parse_args()
    try:
        train(options, pictures(options))
    except (SurgeryError, Diverged) as error:
        raise SystemExit(f"{parser.prog}: {error}") from error
