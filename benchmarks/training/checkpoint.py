"""What a run leaves in its folder: ``run.json`` (what it is), ``log.jsonl`` (a row an epoch), ``report.json`` and ``plan.json``
(of the last surgery), ``last.pt`` and ``epoch-K.pt`` (to go on from).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from surgery import SurgeryValueError

__all__ = ["PLAN", "REPORT", "check_run", "folder_of", "machines", "nearest_before", "read_log", "read_run", "write_checkpoint", "write_run"]

LAST = "last.pt"
LOG = "log.jsonl"
RUN = "run.json"
REPORT = "report.json"
PLAN = "plan.json"
LATER = "later_machines"


def folder_of(runs: Path, network: str, scenario: object, seed: int, label: str = "") -> Path:
    """Of one run. A label tells runs apart that cut in different ways."""
    parts = [str(scenario), *([label] if label else []), f"seed{seed}"]
    return runs / network.rpartition(":")[2] / "-".join(parts)


def write_checkpoint(folder: Path, state: Mapping[str, Any], keep: Collection[int]) -> None:
    """The last checkpoint and the log that is in it; a copy stays where others go on from this epoch."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / (LAST + ".part")
    torch.save(dict(state), part)
    if state["epoch"] in keep:
        shutil.copyfile(part, folder / "copy.part")
        os.replace(folder / "copy.part", folder / f"epoch-{state['epoch']}.pt")
    os.replace(part, folder / LAST)
    _write(folder / LOG, "".join(json.dumps(row) + "\n" for row in state["rows"]))


def _saved(folder: Path, facts: Mapping[str, Any], file: str = LAST) -> dict[str, Any] | None:
    if not (folder / file).exists():
        return None
    state: dict[str, Any] = torch.load(folder / file, map_location="cpu", weights_only=True)
    _check_same(folder, state["facts"], facts)
    return state


def _check_same(folder: Path, known: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    other = {name: (known[name], value) for name, value in facts.items() if name in known and known[name] != value}  # some were not noted once
    if other:
        told = ", ".join(f"{name} {before!r}, not {now!r}" for name, (before, now) in other.items())
        raise SurgeryValueError(f"{folder}: holds a run with {told}; give another --label or --out, or remove it")


def check_run(folder: Path, facts: Mapping[str, Any]) -> None:
    """Refuse a folder in which there is a run that was made in another way, be it over or not.

    Raises:
        SurgeryValueError: it was.
    """
    if (folder / RUN).exists():
        _check_same(folder, read_run(folder), facts)


def nearest_before(folder: Path, facts: Mapping[str, Any], epoch: float) -> dict[str, Any] | None:
    """The latest checkpoint of a run at or before an epoch; None where there is none.

    Raises:
        SurgeryValueError: the run in this folder was made in another way.
    """
    last = _saved(folder, facts)
    if last is None or last["epoch"] <= epoch:
        return last
    kept = [int(file.stem.removeprefix("epoch-")) for file in folder.glob("epoch-*.pt")]
    fitting = [number for number in kept if number <= epoch]
    return _saved(folder, facts, f"epoch-{max(fitting)}.pt") if fitting else None


def write_run(folder: Path, facts: Mapping[str, Any]) -> None:
    """What a run is, for readers of its log."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / RUN, json.dumps(facts, indent=1) + "\n")


def machines(begun: Path | None, epochs: int, here: Mapping[str, Any]) -> dict[str, Any]:
    """What ``run.json`` tells of machines: the one that a run was begun on, and later ones that it was moved to, with the epochs done before each.

    Args:
        begun: folder of the run that it goes on from, its own or another's; None at the beginning.
        epochs: that are done.
        here: this machine.
    """
    if begun is None or not (begun / RUN).exists():
        return dict(here)
    known = read_run(begun)
    later = [machine for machine in known.get(LATER, []) if machine["epochs_before"] < epochs]  # no epoch of this run is of others
    last = later[-1] if later else known
    if any(name in last and last[name] != value for name, value in here.items()):
        later.append({"epochs_before": epochs, **here})
    return {name: known[name] for name in here if name in known} | ({LATER: later} if later else {})


def read_run(folder: Path) -> dict[str, Any]:
    """What ``write_run`` wrote."""
    found: dict[str, Any] = json.loads((folder / RUN).read_text())
    return found


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run, an epoch each; none where it has not begun."""
    file = folder / LOG
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _write(file: Path, text: str) -> None:
    part = file.with_name(file.name + ".part")
    part.write_text(text)
    os.replace(part, file)
