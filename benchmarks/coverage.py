"""On which networks does surgery work? On every one of several libraries it is tried, and the answer is a table.

    python benchmarks/coverage.py [--library NAME ...] [--only REGEX] [--resume | --retry | --table]

All torchvision models that are not quantized, of every module of timm's models the one with the fewest parameters, and the small configurations of
``coverage_catalogue.py``; a library that is not installed is skipped with a word. Random weights, small inputs found by trying. For each network:

- capture: ``surgery.capture`` gives a graph, traced or recorded.
- full rank: ``{"re:.*": 1.0}`` leaves the output and every layer's output equal, in eval mode and in train mode (same seed, same state).
- back: half rank (``{"re:.*": 0.5}``, in place), then ``surgery.reconstruct``: the same outputs, and the keys of ``state_dict`` in the same order.
- account: every convolution and linear layer has exactly one row in ``surgery.report``, decomposed or kept with a reason.

Equal means max |a - b| / max |b| of at most 1e-9 in float64; where a network refuses float64 or narrows it to float32 inside, at most 1e-4 of its
output. Outputs that the data choose (boxes after suppression) need not be equal where all layers before the choice are. Every network runs in a
process of its own. Each row is kept in the working folder, with the commit that it was made at, so that a run can be resumed; the table goes to
``benchmarks/results/coverage.json`` and ``coverage.md``, and counts what has no row yet. ``--resume`` and ``--retry`` go on from that file too.
The libraries: ``pip install -c constraints.txt ".[coverage]"``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import coverage_models
import torch
from coverage_check import TOLERANCE, check

from surgery.benchmark import environment

RESULTS = Path(__file__).parent / "results"
DISTRIBUTIONS = {"segmentation_models_pytorch": "segmentation-models-pytorch"}
GIGABYTE = 2**30
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", nargs="+", choices=list(coverage_models.LIBRARIES), default=list(coverage_models.LIBRARIES), metavar="NAME")
    parser.add_argument("--only", default="", metavar="REGEX", help="networks whose name has a match; rows of others stay")
    parser.add_argument("--resume", action="store_true", help="leave out networks that have a row")
    parser.add_argument("--retry", action="store_true", help="leave out networks that passed")
    parser.add_argument("--table", action="store_true", help="run nothing, write the table of the rows that there are")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "surgery-coverage", help="working folder")
    parser.add_argument("--out", type=Path, default=RESULTS / "coverage.json")
    parser.add_argument("--timeout", type=int, default=3600, help="seconds for one network")
    parser.add_argument("--memory", type=float, default=20, help="gigabytes for one network")
    parser.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(check(coverage_models.network_named(options.one))))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    file = options.work / "rows.jsonl"
    again = options.resume or options.retry or options.table
    rows = (published(options.out) if again else {}) | read_rows(file)
    wanted: list[tuple[str, int]] = []
    absent: list[str] = []
    for library in options.library:
        names = listed(library, options.work)
        wanted += names
        if not names:
            absent.append(library)
            print(f"{library} is not installed: skipped", flush=True)
    # a library after the other makes no difference, so small networks first in all: an early end has seen most of them
    names = [name for name, _ in sorted(wanted, key=lambda pair: pair[1]) if re.search(options.only, name)]
    commit = current_commit()
    for name in [] if options.table else names:
        if (options.resume and name in rows) or (options.retry and name in rows and rows[name]["passed"]):
            continue
        rows[name] = in_a_process(name, options.timeout, options.memory) | {"commit": commit}
        with file.open("a") as lines:
            lines.write(json.dumps(rows[name]) + "\n")
        print(line(rows[name]), flush=True)
    publish(list(rows.values()), absent, [name for name in names if name not in rows], "python benchmarks/coverage.py", options.out)


def published(file: Path) -> dict[str, Row]:
    """The rows of the results."""
    return {row["name"]: row for row in json.loads(file.read_text())["rows"]} if file.exists() else {}


def current_commit() -> str | None:
    """Of the code that is run; None outside a repository."""
    try:
        told = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return told.stdout.strip()


def read_rows(file: Path) -> dict[str, Row]:
    """The newest row of each network."""
    if not file.exists():
        return {}
    found = [json.loads(text) for text in file.read_text().splitlines()]
    return {row["name"]: row for row in found}


def listed(library: str, work: Path) -> list[tuple[str, int]]:
    """Names and sizes of a library's networks; kept in the working folder for the registries, where counting takes minutes."""
    file = work / f"{library}-{installed(library)}.json"
    if library in ("torchvision", "timm") and file.exists():
        return [(name, size) for name, size in json.loads(file.read_text())]
    names = [(network.name, network.size) for network in coverage_models.networks(library)]
    if library in ("torchvision", "timm"):
        file.write_text(json.dumps(names))
    return names


def installed(library: str) -> str | None:
    try:
        return version(DISTRIBUTIONS.get(library, library))
    except PackageNotFoundError:
        return None


def in_a_process(name: str, timeout: int, memory: float, script: str = __file__) -> Row:
    """The row of one network, as ``script --one NAME`` prints it; a process that ends early or takes too long makes a row that says so."""
    began = time.perf_counter()
    limit = int(memory * GIGABYTE)
    with tempfile.TemporaryDirectory() as home:  # some libraries write settings
        process = subprocess.Popen(
            [sys.executable, script, "--one", name],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"YOLO_CONFIG_DIR": home, "HF_HUB_OFFLINE": "1", "YOLO_OFFLINE": "true"},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        )
        try:
            out, err = process.communicate(timeout=timeout)
            failure = None if process.returncode == 0 else f"the process ended with {process.returncode}: {' | '.join(err.strip().splitlines()[-3:])}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            failure = f"took more than {timeout} s"
    if failure is None:
        row: Row = json.loads(out.strip().splitlines()[-1])
        return row
    library, seconds = name.partition(":")[0], {"all": round(time.perf_counter() - began, 2)}
    return {"name": name, "library": library, "failures": [failure], "notes": [], "seconds": seconds, "passed": False}


def publish(rows: Sequence[Row], absent: Sequence[str], missing: Sequence[str], command: str, out: Path) -> None:
    """Write the results and the table, and print the summary."""
    order = list(coverage_models.LIBRARIES)
    rows = sorted(rows, key=lambda row: (order.index(row["library"]), row["name"]))
    versions = {library: installed(library) for library in order}
    facts = environment() | {name: v for name, v in versions.items() if v is not None}
    found = {
        "command": command,
        "environment": facts,
        "threads": torch.get_num_threads(),
        "tolerance": {str(dtype).removeprefix("torch."): value for dtype, value in TOLERANCE.items()},
        "skipped": list(absent),
        "passed": sum(row["passed"] for row in rows),
        "networks": len(rows),
        "without_a_row": list(missing),
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    text = summary(rows)
    words = ", ".join(f"{key} {value}" for key, value in facts.items())
    commits = ", ".join(sorted({str(row["commit"]) for row in rows if row.get("commit")}))
    made = f"Made by `{command}` with {words}, at commit {commits}." + (f" **{len(missing)} networks have no row yet.**" if missing else "")
    out.with_suffix(".md").write_text(f"# Coverage\n\n{INTRODUCTION}\n\n{text}\n\n{made}\n\n{table(rows)}")
    print(text)
    for row in rows:
        if not row["passed"]:
            print(line(row))


INTRODUCTION = """\
Random weights, small inputs. A network passes if it is captured, equals itself decomposed at full rank in eval and in train mode, comes back from
half rank with equal outputs and the same `state_dict` keys, and has every convolution and linear layer accounted for (what that means exactly:
`benchmarks/coverage.py`). Errors are max |a - b| / max |b|, the larger of the output's and of any layer's. `cut / kept` counts convolutions and
linear layers; linear layers are cut only where they are named, so here they are kept. Seconds are by the clock, on one core, beside whatever else the
machine does: of capture, of the cut at full rank, of half rank and back, and of the row with all runs and comparisons."""


def summary(rows: Sequence[Row]) -> str:
    """A row a library, in markdown."""
    heads = ["library", "passed", "of", "traced", "recorded", "not run in train mode", "layers", "cut", "largest error", "median s", "s in all"]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    groups = {library: [row for row in rows if row["library"] == library] for library in dict.fromkeys(row["library"] for row in rows)}
    for title, group in [*groups.items(), ("all", list(rows))]:
        seconds = sorted(row["seconds"]["all"] for row in group)
        errors = [error(row, key) for row in group if str(row.get("dtype")) == "float64" for key in ("full_eval", "full_train", "back")]
        cells: Iterable[Any] = (
            title,
            sum(row["passed"] for row in group),
            len(group),
            sum(row.get("capture") == "traced" for row in group),
            sum(row.get("capture") == "recorded" for row in group),
            sum(row.get("train") is False for row in group),
            sum(sum(row.get("layers", {}).values()) for row in group),
            sum(row.get("decomposed", 0) for row in group),
            number(max((e for e in errors if e is not None), default=None)),
            f"{seconds[len(seconds) // 2]:.1f}" if seconds else "-",
            f"{sum(seconds):.0f}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def table(rows: Sequence[Row]) -> str:
    """A row a network, in markdown, then in words whatever a row has to say."""
    heads = [
        "network",
        "parameters",
        "inputs",
        "captured",
        "dtype",
        "cut / kept",
        "full, eval",
        "full, train",
        "back",
        "s capture / full / half / all",
        "passes",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 2) + "|---|"]
    for row in rows:
        seconds = row["seconds"]
        times = [seconds.get("capture"), seconds.get("full"), sum(seconds.get(key, 0.0) for key in ("half", "back")), seconds["all"]]
        cells = (
            row["name"],
            f"{row['parameters']:,}" if "parameters" in row else "-",
            f"{row['given']}, batch {row['batch']}" if "given" in row else "-",
            row.get("capture", "-"),
            row.get("dtype", "-"),
            f"{row['decomposed']} / {sum(row['kept'].values())}" if "kept" in row else "-",
            number(error(row, "full_eval")),
            number(error(row, "full_train")) if row.get("train") is not False else "not run",
            number(error(row, "back")),
            " / ".join("-" if s is None else f"{s:.1f}" for s in times),
            "yes" if row["passed"] else "**no**",
        )
        lines.append("| " + " | ".join(cells) + " |")
    failures = [f"- {row['name']}: {one_line(failure)}" for row in rows for failure in row["failures"]]
    notes = [f"- {row['name']}: {one_line(note)}" for row in rows for note in [*row["notes"], *choices(row)]]
    reasons: dict[str, int] = {}
    for row in rows:
        for reason, count in row.get("kept", {}).items():
            general = re.sub(r"(shared with|read by|held in|it is also) .*", r"\1 ...", reason)
            reasons[general] = reasons.get(general, 0) + count
    kept = [f"- {count} x {reason}" for reason, count in sorted(reasons.items(), key=lambda pair: -pair[1])]
    parts = [("Networks", lines), ("What failed", failures or ["Nothing."]), ("Why layers are kept", kept), ("Notes", notes or ["None."])]
    return "\n\n".join(f"## {title}\n\n" + "\n".join(text) for title, text in parts) + "\n"


def choices(row: Row) -> list[str]:
    """What a row compared less than everything of, in words."""
    keys = ("full_eval", "full_train", "back")
    return [f"{key}: compared are the {row[key]['compared']}" for key in keys if row.get(key, {}).get("output", 0) is None]


def error(row: Row, key: str) -> float | None:
    found = row.get(key)
    return None if found is None else max(found["output"] or 0.0, found["layers"])


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def one_line(text: str) -> str:
    return " ".join(text.split())


def line(row: Row) -> str:
    verdict = "pass" if row["passed"] else "FAIL"
    return one_line(f"{verdict} {row['name']} {row['seconds']['all']:.1f} s {row.get('capture', '-')} " + "; ".join(row["failures"]))[:1200]


if __name__ == "__main__":
    main()
