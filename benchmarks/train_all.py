"""Work through a list of training runs, one at a time, for as long as the machine is idle.

    python benchmarks/train_all.py --data ROOT --out RUNS [--queue benchmarks/training/two_cores.json] [--threads N] [--in-turn]
    python benchmarks/train_all.py --out RUNS --status

The queue is a JSON list of entries with ``network`` and ``epochs``, and where wanted ``scenarios``, ``seeds``, ``priority`` (a number, 1 by default),
``label`` and ``recipe``: an object of whatever else differs from the defaults of ``training/recipe.py``. Runs of lower priority numbers come first,
then lower seeds, then in the order of the file, originals before the scenarios that go on from them. Stop it at any time: a run loses the epoch that
it is in, and goes on from there when the command is given again; runs that are done are passed over. Only one process works on a folder at a time.
``--in-turn`` trains an epoch of each run of a network and seed, then the next of each: on a machine whose speed changes their times stay comparable.
``--status`` says what is done and how long the rest would take by the epochs measured so far. ``training_tables.py`` draws what there is.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from training.checkpoint import check_run, folder_of, read_log
from training.command import order, teller
from training.data import InMemory, Pictures
from training.engine import Diverged, run
from training.recipe import Recipe
from training.scenario import Scenario, branch_points, usual

from surgery import SurgeryError, SurgeryValueError

QUEUE = Path(__file__).parent / "training" / "two_cores.json"
FIELDS = {"network", "epochs", "scenarios", "seeds", "priority", "label", "recipe"}


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One run."""

    recipe: Recipe
    scenario: Scenario
    label: str
    keep: frozenset[int]

    def folder(self, runs: Path) -> Path:
        return folder_of(runs, self.recipe.network, self.scenario, self.recipe.seed, self.label if self.scenario != Scenario() else "")

    @property
    def length(self) -> int:
        return self.scenario.length(self.recipe.epochs)


def jobs_of(text: str) -> list[Job]:
    """The jobs of a queue, in their order. An original that several entries share is one job.

    Raises:
        SurgeryValueError: not such a list, or two entries have one run in two ways; the entry and what is wrong are named.
    """
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise SurgeryValueError(f"queue: not JSON ({error})") from error
    if not isinstance(entries, list):
        raise SurgeryValueError("queue: expected a list of entries")
    found = [job for number, entry in enumerate(entries) for job in _jobs_of_entry(number, entry)]
    points: dict[tuple[str, int, Scenario, str], set[int]] = {}
    for _, job in found:
        for scenario, epochs in branch_points([job.scenario], job.recipe.epochs).items():
            points.setdefault(_name(job, scenario), set()).update(epochs)
    ordered: dict[tuple[Any, ...], tuple[int, Job]] = {}
    for (_, _, number, _), job in sorted(found, key=lambda pair: pair[0]):
        name = _name(job, job.scenario)
        if name in ordered:
            _check_same(*ordered[name], number, job)
        ordered.setdefault(name, (number, Job(job.recipe, job.scenario, job.label, job.keep | points.get(name, set()))))
    return [job for _, job in ordered.values()]


def _check_same(number: int, job: Job, other_number: int, other: Job) -> None:
    """Two entries may have one run, but not in two ways: it has one folder."""
    ours, theirs = job.recipe.facts(job.scenario), other.recipe.facts(job.scenario)
    told = ", ".join(f"{name} {value!r} and {theirs[name]!r}" for name, value in ours.items() if theirs[name] != value)
    if told:
        which = f"entries {number + 1} and {other_number + 1} both have {job.scenario} of {job.recipe.network} with seed {job.recipe.seed}"
        original = job.scenario == Scenario()  # a label tells ways of cutting apart, so that originals have none
        remedy = "put one of them into a queue of its own, with another --out" if original else "give one of them a label"
        raise SurgeryValueError(f"queue: {which}, with {told}; {remedy}")


def _name(job: Job, scenario: Scenario) -> tuple[str, int, Scenario, str]:
    return job.recipe.network, job.recipe.seed, scenario, job.label if scenario != Scenario() else ""


def _jobs_of_entry(number: int, entry: Any) -> Iterator[tuple[tuple[Any, ...], Job]]:
    what = f"queue: entry {number + 1}"
    if not isinstance(entry, dict) or not {"network", "epochs"} <= set(entry) <= FIELDS:
        raise SurgeryValueError(f"{what}: expected an object with network and epochs, and nothing beyond {sorted(FIELDS)}")
    options = dict(entry.get("recipe", {}))
    unknown = set(options) - ({field.name for field in fields(Recipe)} - {"network", "epochs", "seed"})
    if unknown:
        raise SurgeryValueError(f"{what}: a recipe has no {sorted(unknown)}")
    seeds, drops = entry.get("seeds", [0]), options.get("drops", [])
    if not isinstance(entry["epochs"], int) or not isinstance(seeds, list) or not isinstance(drops, list):
        raise SurgeryValueError(f"{what}: expected a number for epochs, and lists for seeds and drops")
    options |= {"drops": tuple(drops)} if "drops" in options else {}
    every = range(5, entry["epochs"] + 1, 5)  # for rank_growth.py
    for seed in seeds:
        recipe = Recipe(network=entry["network"], epochs=entry["epochs"], seed=seed, **options)
        names = entry.get("scenarios") or usual(recipe.network, recipe.epochs)
        for place, scenario in enumerate(sorted((Scenario.parse(name) for name in names), key=order)):
            scenario.check(recipe.epochs)
            keep = frozenset(every if scenario == Scenario() else ())
            yield (entry.get("priority", 1), seed, number, place), Job(recipe, scenario, entry.get("label", ""), keep)


@contextmanager
def alone(runs: Path) -> Iterator[None]:
    """Only one process works on a folder.

    Raises:
        SurgeryValueError: another one does.
    """
    runs.mkdir(parents=True, exist_ok=True)
    with (runs / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SurgeryValueError(f"out: another process is at work on {runs}") from error
        yield


def work(jobs: list[Job], data: Path, runs: Path, *, in_turn: bool = False) -> list[str]:
    """Do what is not done yet; what diverged is passed over and named in the end.

    Raises:
        SurgeryValueError: a run is there that was made in another way, or one cannot be made; said before any is trained.
    """
    held: dict[tuple[Any, ...], Pictures] = {}

    def pictures(job: Job) -> Pictures:
        key = job.recipe.batch, job.recipe.device, job.recipe.subset
        if key not in held:
            held[key] = InMemory.cifar10(data, *key)
        return held[key]

    for job in jobs:
        check_run(job.folder(runs), {"scenario": str(job.scenario)} | job.recipe.facts(job.scenario))
        if len(read_log(job.folder(runs))) < job.length:
            job.recipe.schedule(job.scenario, pictures(job))
    failed: dict[Job, str] = {}
    for job, until in _in_turn(jobs) if in_turn else ((job, job.length) for job in jobs):
        if job in failed or len(read_log(job.folder(runs))) >= until:
            continue
        told = teller(job.recipe, job.scenario)
        try:
            run(job.recipe, job.scenario, pictures(job), runs, label=job.label, keep=job.keep, until=until, tell=told)
        except Diverged as error:
            failed[job] = str(error)
            print(error, file=sys.stderr, flush=True)
    return list(failed.values())


def _in_turn(jobs: list[Job]) -> Iterator[tuple[Job, int]]:
    """Who trains next, and to which epoch: of a network and seed an epoch of each run, once it is on its own."""
    for group in dict.fromkeys((job.recipe.network, job.recipe.seed) for job in jobs):
        mine = [job for job in jobs if (job.recipe.network, job.recipe.seed) == group]
        for until in range(1, max(job.length for job in mine) + 1):
            for job in mine:
                branch = job.scenario.branch(job.recipe.epochs)
                if (0 if branch is None else branch[1]) < until <= job.length:
                    yield job, until


def status(jobs: list[Job], runs: Path) -> Iterator[str]:
    """A line a job: epochs done, and seconds that the rest takes by the epochs that this network's runs took."""
    total = 0.0
    for job in jobs:
        rows = read_log(job.folder(runs))
        left = max(job.length - len(rows), 0)
        branch = job.scenario.branch(job.recipe.epochs)
        left = min(left, job.length - branch[1]) if branch is not None else left
        seconds = left * _epoch_seconds(job, jobs, runs)
        total += seconds
        told = "done" if not left else f"{left} epochs left, about {seconds / 60:.0f} min"
        yield f"{job.recipe.network} seed {job.recipe.seed} {job.scenario}: {told}"
    yield f"about {total / 3600:.1f} hours in all" + ("" if total else ", where nothing was measured yet 0 is counted")


def _epoch_seconds(job: Job, jobs: list[Job], runs: Path) -> float:
    rows = read_log(job.folder(runs))
    for other in (job, *(j for j in jobs if j.recipe.network == job.recipe.network)):
        rows = rows or read_log(other.folder(runs))
    if not rows:
        return 0.0
    return statistics.median(b["seconds"] - a["seconds"] for a, b in zip([{"seconds": 0.0}, *rows], rows, strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--queue", type=Path, default=QUEUE)
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--in-turn", action="store_true", help="an epoch of each run of a network and seed, then the next")
    parser.add_argument("--status", action="store_true", help="say what is done, and do nothing")
    options = parser.parse_args()
    if options.data is None and not options.status:
        parser.error("--data is needed, but for --status")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        jobs = jobs_of(options.queue.read_text())
        if options.status:
            print("\n".join(status(jobs, options.out)))
            return
        with alone(options.out):
            failed = work(jobs, options.data, options.out, in_turn=options.in_turn)
    except SurgeryError as error:
        raise SystemExit(f"{parser.prog}: {error}") from error
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
