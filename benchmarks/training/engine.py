"""One run of one scenario: epochs, the surgery between them, a checkpoint and a row of the log after each; it goes on where it was cut off."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import surgery
from surgery.benchmark import environment
from surgery.cost import count_macs
from training.checkpoint import PLAN, REPORT, folder_of, machines, nearest_before, read_log, write_checkpoint, write_run
from training.data import Pictures
from training.memory import keep_memory
from training.recipe import Recipe, fresh_network
from training.scenario import Scenario

__all__ = ["Diverged", "run"]

Row = dict[str, Any]


class Diverged(RuntimeError):
    """The loss is no number any more."""


def run(
    recipe: Recipe,
    scenario: Scenario,
    pictures: Pictures,
    runs: Path,
    *,
    label: str = "",
    keep: Collection[int] = (),
    until: int | None = None,
    tell: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Train one scenario to its end, from its last checkpoint, or from where it parts from another scenario's run, or from the beginning.

    Epochs that were taken from another run are in the log with their times, as if they had been run here. The log's times are in seconds and
    cumulative: ``seconds`` is the sum of training, surgery (with the measurements and plans that it takes) and evaluation.

    Args:
        recipe: how.
        scenario: what.
        pictures: on what.
        runs: folder of all runs.
        label: part of the name of the run's folder, for scenarios that cut.
        keep: numbers of epochs after which a checkpoint is to stay, for others to go on from.
        until: stop after this epoch; at the end where None.
        tell: is given each new row.

    Returns:
        All rows of the log.

    Raises:
        SurgeryValueError: a scenario that does not fit, or a folder with a run of another recipe or on other pictures.
        Diverged: the loss is no number any more; what there is of the run stays.
    """
    scenario.check(recipe.epochs)
    folder = _folder(recipe, scenario, runs, label)
    kept = keep_memory()
    trainer = _Trainer.of(recipe, scenario, pictures)
    begun, state = _beginning(recipe, scenario, pictures, runs, label)
    if state is not None:
        trainer.load(state)
    if begun == folder and len(read_log(folder)) < trainer.epoch:  # it was stopped between the two
        write_checkpoint(folder, trainer.state(), keep)
    last = scenario.length(recipe.epochs)
    end = last if until is None else min(until, last)
    if trainer.epoch < end:  # a machine that trains nothing of a run is none of its machines
        here = {"environment": environment(), "threads": torch.get_num_threads(), "memory_kept": kept}
        write_run(folder, trainer.facts | {"label": label} | machines(begun, trainer.epoch, here))
    while trainer.epoch < end:
        row = trainer.one_epoch()
        if row["surgery"]:
            trainer.tell_surgery(folder)
        write_checkpoint(folder, trainer.state(), keep)
        tell(row)
    return trainer.rows


def _folder(recipe: Recipe, scenario: Scenario, runs: Path, label: str) -> Path:
    return folder_of(runs, recipe.network, scenario, recipe.seed, label if scenario != Scenario() else "")


def _facts(recipe: Recipe, scenario: Scenario, pictures: Pictures) -> dict[str, Any]:
    return {"scenario": str(scenario)} | recipe.facts(scenario) | pictures.facts()


def _beginning(
    recipe: Recipe, scenario: Scenario, pictures: Pictures, runs: Path, label: str, at_most: float = math.inf
) -> tuple[Path | None, dict[str, Any] | None]:
    """The checkpoint to go on from, and the folder that it is of: this run's own, or the latest that it shares with another's, or none."""
    folder = _folder(recipe, scenario, runs, label)
    state = nearest_before(folder, _facts(recipe, scenario, pictures), at_most)
    branch = scenario.branch(recipe.epochs)
    if state is None and branch is not None:
        return _beginning(recipe, branch[0], pictures, runs, label, min(branch[1], at_most))
    return (None if state is None else folder), state


@dataclass(slots=True, eq=False)
class _Trainer:
    """Network, optimizer and schedule of a run, and how far it is."""

    recipe: Recipe
    scenario: Scenario
    pictures: Pictures
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: surgery.DecompositionSchedule | None
    epoch: int = 0
    rows: list[Row] = field(default_factory=list)
    report: surgery.Report | None = None  # of the surgery that was done last
    _called: nn.Module | None = None  # the model, or it compiled
    _macs: int | None = None

    @classmethod
    def of(cls, recipe: Recipe, scenario: Scenario, pictures: Pictures) -> _Trainer:
        model = fresh_network(recipe)
        optimizer = torch.optim.SGD(model.parameters(), recipe.rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
        return cls(recipe, scenario, pictures, model, optimizer, recipe.schedule(scenario, pictures))

    @property
    def facts(self) -> dict[str, Any]:
        return _facts(self.recipe, self.scenario, self.pictures)

    def state(self) -> dict[str, Any]:
        return {
            "facts": self.facts,
            "epoch": self.epoch,
            "rows": self.rows,
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        if self.schedule is not None and state["schedule"] is not None:
            self.schedule.load_state_dict(state["schedule"], self.model, self.optimizer)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.rows = state["epoch"], state["rows"]

    def tell_surgery(self, folder: Path) -> None:
        """What was done last, and the plan of all chains that were cut, for readers and to be replayed."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.report is not None:
            (folder / REPORT).write_text(self.report.to_json())
        if self.schedule is not None and self.schedule.plan is not None:
            self.schedule.plan.save(folder / PLAN)

    def one_epoch(self) -> Row:
        """Surgery where it is due, all training pictures once, all test pictures once."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate_of(self.scenario, self.epoch)
        started = self._now()
        # not in self._precision(): the cut computes with its own dtypes, and the guard keeps the times of layers as those of float32
        done = None if self.schedule is None else self.schedule.step(self.epoch, self.model, self.optimizer)
        cut = self._now()
        if done is not None:
            self.report, self._called, self._macs = done, None, None
        loss = self._train()
        trained = self._now()
        top1, top5 = self._evaluate()
        evaluated = self._now()
        self.epoch += 1
        before = self.rows[-1] if self.rows else {}
        spent = {"surgery_seconds": cut - started, "train_seconds": trained - cut, "evaluation_seconds": evaluated - trained}
        spent |= {"seconds": evaluated - started}
        row = {
            "epoch": self.epoch,
            "train_loss": loss,
            "top1": top1,
            "top5": top5,
            "best_top1": max(top1, before.get("best_top1", 0.0)),
            "rate": self.recipe.rate_of(self.scenario, self.epoch - 1),
            **{name: round(before.get(name, 0.0) + value, 3) for name, value in spent.items()},
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "macs": self._count_macs(),
            "surgery": None if done is None else self._what_was_done(done),
            "load_average": os.getloadavg()[0],
        }
        self.rows.append(row)
        return row

    def _what_was_done(self, done: surgery.Report) -> str:
        if self.schedule is not None and self.schedule.whole_again:
            return "reconstructed"
        return "decomposed" if any(row.status == "decomposed" for row in done.layers) else "nothing cut"

    def _train(self) -> float:
        """One step a batch; the mean loss."""
        torch.manual_seed(100_003 * self.recipe.seed + self.epoch)  # for networks that draw numbers
        self.model.train()
        called = self._compiled() if self.recipe.compiled else self.model
        total, steps = torch.zeros((), device=self.recipe.device), 0
        for x, y in self.pictures.train(self.recipe.seed, self.epoch):
            with self._precision():
                loss = functional.cross_entropy(called(self.recipe.formatted(x)), y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.detach()
            steps += 1
        mean = float(total) / steps
        if not math.isfinite(mean):
            raise Diverged(f"{self.recipe.network}, {self.scenario}: the loss of epoch {self.epoch + 1} is {mean}")
        return mean

    def _evaluate(self) -> tuple[float, float]:
        """Top-1 and top-5 on the test pictures, percent."""
        self.model.eval()
        hits, count = torch.zeros(2, device=self.recipe.device), 0
        with torch.no_grad(), self._precision():
            for x, y in self.pictures.test():
                logits = self.model(self.recipe.formatted(x))
                right = logits.topk(min(5, logits.shape[1]), 1).indices == y[:, None]
                hits += torch.stack([right[:, 0].sum(), right.sum()])
                count += len(y)
        top1, top5 = (100 * float(hit) / count for hit in hits)
        return top1, top5

    def _compiled(self) -> nn.Module:
        if self._called is None:
            torch._dynamo.reset()  # else each cut of each run in this process counts towards the limit past which nothing is compiled any more
            self._called = torch.compile(self.model)  # type: ignore[assignment]
        return self._called  # type: ignore[return-value]

    def _precision(self) -> torch.autocast:
        return torch.autocast(torch.device(self.recipe.device).type, torch.bfloat16, enabled=self.recipe.bf16)

    def _count_macs(self) -> int:
        if self._macs is None:
            x = self.recipe.formatted(self.pictures.sample(1)[0][:1])
            with torch.no_grad(), count_macs() as counter:
                self.model.eval()(x)
            self._macs = counter.macs
        return self._macs

    def _now(self) -> float:
        if self.recipe.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()
