"""What a cut costs before any training: the peers' way beside ours, on trained networks.

    python benchmarks/accuracy.py --data ROOT --cifar FOLDER [--only TEXT ...] [--choosing]

- ResNet-20 and ResNet-56 on CIFAR-10: calibrated on 1,024 training images without their labels, three disjoint draws; top-1 on all 10,000 test
  images.
- VDSR: calibrated on pieces of the photographs that scikit-image ships, scaled down and up again (x3), three disjoint draws; PSNR on Set5 x3. Without
  scikit-image it is left out.

Ways: ``data`` (a budget with ``calibration=``), ``auto`` (the same with all kinds), ``refine`` (``data`` polished), ``weights`` (the budget by the
weights alone), ``fraction`` (Tucker at one fraction of the ranks everywhere, the weights alone: what peers do); and ``plan``, the time that planning
by MACs takes.

ROOT holds the trained weights (``weights/``, ``vdsr/``), FOLDER the official ``cifar-10-batches-py``. Every row is appended to
``benchmarks/results/accuracy.jsonl`` when it is done, and a row that is there is not measured again, so a run that was stopped goes on. Table and
picture (``accuracy.md``, ``accuracy.png``) are made of all rows at the end; ``--table`` makes them of what is there. To choose something take
``--choosing``: scores are then of 2,000 training images (pieces of photographs) that no draw has, and are only printed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accuracy_cases import DRAWS, Case, cifar_case, vdsr_case
from accuracy_table import draw, table
from torch import nn

import surgery
from surgery import Budget, Refine
from surgery.benchmark import environment

RESULTS = Path(__file__).parent / "results" / "accuracy.jsonl"
EPOCHS = {"resnet56": 10, "vdsr": 8}
KEY = ("network", "share", "way", "draw")
BLIND = ("fraction", "weights", "plan")  # do not look at data: one row is enough
WAYS: dict[tuple[str, float], tuple[str, ...]] = {
    ("resnet56", 0.5): ("data", "refine", "auto", "fraction", "weights", "plan"),
    ("resnet56", 0.7): ("data", "auto", "fraction"),
    ("resnet20", 0.7): ("data", "auto", "fraction", "weights"),
    ("vdsr", 0.5): ("data", "refine", "auto", "fraction", "weights"),
}


def rows_wanted() -> Iterator[tuple[str, float, str, int]]:
    """The first draw of everything comes first."""
    for number in range(DRAWS):
        for (network, share), ways in WAYS.items():
            for way in ways:
                if number == 0 or way not in BLIND:
                    yield network, share, way, number


def measure(case: Case, share: float, way: str, number: int) -> dict[str, Any]:
    """One row: what was asked, what came out, and how long the surgery took."""
    load = os.getloadavg()[0]
    wall, cpu = time.perf_counter(), time.process_time()
    net = cut(case, share, way, number)
    seconds = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu, "load_average": load}
    row = dict(zip(KEY, (case.name, share, way, number), strict=True)) | seconds | {"threads": torch.get_num_threads(), "environment": environment()}
    if net is None:
        return row
    report = surgery.report(net)
    row |= {"score": case.measure(net), "unit": case.unit, **case.facts, "calibrated": report.calibrated}
    if way == "original":
        return row | {"macs": 1.0, "params": 1.0}
    row |= {"macs": report.macs_after / report.macs_before, "params": report.params_after / report.params_before}  # type: ignore[operator]
    row |= {"statistics_anew": any(not torch.equal(old, new) for old, new in zip(case.model.buffers(), net.buffers(), strict=True))}
    return row | ({"epochs": EPOCHS[case.name]} if way == "refine" else {})


def cut(case: Case, share: float, way: str, number: int) -> nn.Module | None:
    if way == "original":
        return case.model
    if way == "fraction":
        return one_fraction(case, share)
    if way == "plan":
        surgery.plan(case.model, Budget(macs=share), example_inputs=case.inputs)
        return None
    options: dict[str, Any] = {"method": "auto"} if way == "auto" else {}
    if way != "weights":
        options["calibration"] = case.draws[number]
    if way == "refine":
        options["refine"] = Refine(epochs=EPOCHS[case.name])
    return surgery.decompose(case.model, Budget(macs=share), example_inputs=case.inputs, **options)


def one_fraction(case: Case, share: float) -> nn.Module:
    """Tucker of every kxk convolution at one fraction of the ranks: the largest whose MACs are within the share."""
    low, high, best = 0.0, 1.0, None
    for _ in range(8):
        middle = (low + high) / 2
        net = surgery.decompose(case.model, middle, example_inputs=case.inputs, guard="none")
        report = surgery.report(net)
        if report.macs_after <= share * report.macs_before:  # type: ignore[operator]
            low, best = middle, net
        else:
            high = middle
    if best is None:
        raise RuntimeError(f"no fraction is within {share} of the MACs")
    return best


def case_of(network: str, options: argparse.Namespace) -> Case | None:
    if network == "vdsr":
        return vdsr_case(options.data, options.choosing)
    return cifar_case(network, options.data, options.cifar, options.choosing)


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with weights/ and vdsr/")
    parser.add_argument("--cifar", type=Path, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--only", nargs="+", metavar="TEXT", default=[""], help="only rows whose name begins so, for example resnet56/0.5/data")
    parser.add_argument("--choosing", action="store_true", help="scores on what is neither for calibration nor for tests; nothing is written")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not options.table and (options.data is None or options.cifar is None):
        parser.error("--data and --cifar are needed to measure anything")
    wanted = [] if options.table else [row for row in rows_wanted() if "/".join(map(str, row)).startswith(tuple(options.only))]
    known = set() if options.choosing else {tuple(row[k] for k in KEY) for row in read(options.out)}
    cases: dict[str, Case | None] = {}
    for network, share, way, number in wanted:
        for row_key in ((network, 1.0, "original", 0), (network, share, way, number)):
            if row_key in known or (way == "plan" and row_key[2] == "original"):
                continue
            case = cases[network] = cases[network] if network in cases else case_of(network, options)
            if case is None:
                print(f"{network} is left out: scikit-image is not installed", file=sys.stderr)
                break
            row = measure(case, *row_key[1:])
            known.add(row_key)
            print(json.dumps(row), flush=True)
            if not options.choosing:
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    if not options.choosing:
        rows = read(options.out)
        done = {tuple(row[k] for k in KEY) for row in rows}
        options.out.with_suffix(".md").write_text(table(rows, ["/".join(map(str, row)) for row in rows_wanted() if row not in done]))
        draw(options.out.with_suffix(".png"), rows)


if __name__ == "__main__":
    main()
