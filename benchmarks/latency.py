"""FLOPs reduced against time reduced, by network, rank policy and runtime, with the spread of every ratio and with the rows that lose.

    python benchmarks/latency.py [--only NAME ...] [--policies NAME ...] [--runtimes NAME ...] [--threads N] [--table]

Each row is a network, cut by a policy (``POLICIES``), timed in turn with the whole network by ``surgery.benchmark``. Weights are those of
``synthetic.py``: trained ones are not at hand for all of these, and time does not depend on them but by the ranks that a rule gives. The policies of
one share of MACs differ in what runtimes like: ranks in multiples of 8 or 16, neighbouring 1x1 layers merged (``surgery.deploy``, on both networks),
chains that do not pay left out.

A row is appended to ``benchmarks/results/latency.jsonl`` when it is done, and one that is there, of the same threads and batch, is not measured
again: a run that was stopped goes on. Table and pictures (``latency.md``, ``latency.png``) are made of all rows at the end; ``--table`` makes them of
what is there. Let nothing else run on the machine meanwhile, or pin this and all else to cores of their own (``taskset``); the load average is kept
with the rows so that readers can tell. ``results/latency_beside.jsonl`` has rows measured both ways.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import synthetic
import torch
from latency_table import draw, markdown
from networks import NETWORKS, network
from torch import Tensor, nn

import surgery
from surgery.benchmark import environment
from surgery.ranks.budget import RUNTIMES as ASKED

RESULTS = Path(__file__).parent / "results" / "latency.jsonl"
RUNTIMES = ("onnxruntime", "openvino", "eager", "torchscript", "compile", "train", "cuda", "cuda-graph")
BY_DEFAULT = ("onnxruntime", "openvino", "eager", "torchscript", "train")
FILES = ("onnxruntime", "openvino")
KEY = ("network", "policy", "runtime", "threads", "batch")


@dataclass(frozen=True, slots=True)
class Policy:
    """How a network is cut.

    Attributes:
        arguments: those of ``surgery.decompose``, by runtime and threads.
        deployed: whether both networks are cleaned by ``surgery.deploy``.
        measured: whether the plan depends on the runtime.
    """

    arguments: Callable[[str, int], dict[str, Any]]
    deployed: bool = False
    measured: bool = False


def _timed(runtime: str) -> str:
    """What chains are timed in for a runtime that has no clock for them."""
    return runtime if runtime in ASKED else "eager"


def _half(**options: Any) -> Callable[[str, int], dict[str, Any]]:
    return lambda *_: {"ranks": surgery.Budget(macs=0.5)} | options


POLICIES = {
    "evbmf": Policy(lambda *_: {"ranks": "evbmf"}),
    "fraction=0.5": Policy(lambda *_: {"ranks": 0.5, "round_to": 8}),
    "macs=0.5": Policy(_half()),
    "macs=0.5 round_to=8": Policy(_half(round_to=8)),
    "macs=0.5 round_to=16": Policy(_half(round_to=16)),
    "macs=0.5 round_to=8 deployed": Policy(_half(round_to=8), deployed=True),
    "macs=0.5 round_to=8 auto": Policy(_half(round_to=8, method="auto")),
    "macs=0.5 round_to=8 guard=latency": Policy(lambda runtime, _: _half(round_to=8, guard=f"latency:{_timed(runtime)}")(runtime, _), measured=True),
    "latency=0.7": Policy(lambda runtime, n: {"ranks": surgery.Budget(latency=0.7, runtime=_timed(runtime), threads=n)}, measured=True),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One network cut by one policy.

    Attributes:
        before: the original, cleaned where the policy says so.
        after: the cut one.
        inputs: of both.
        facts: what the cut came to.
        files: where the ONNX files of both go, which are written when they are first asked for.
    """

    before: nn.Module
    after: nn.Module
    inputs: Tensor
    facts: dict[str, Any]
    files: tuple[Path, Path]

    def written(self) -> tuple[Path, Path]:
        for net, file in zip((self.before, self.after), self.files, strict=True):
            if not file.exists():
                file.parent.mkdir(exist_ok=True)
                surgery.export_onnx(net, file, self.inputs, check=False)
        return self.files


def cut(model: nn.Module, inputs: Tensor, policy: Policy, runtime: str, threads: int) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """Both networks, and what the cut came to."""
    began = time.perf_counter()
    net = surgery.decompose(model, example_inputs=inputs, **policy.arguments(runtime, threads))
    report = surgery.report(net)
    layers = [row for row in report.layers if not row.layer.startswith("Linear")]
    facts = {
        "seconds_to_cut": time.perf_counter() - began,
        "layers_cut": sum(row.status == "decomposed" for row in layers),
        "layers": len(layers),
        "rms_error": (sum((row.error or 0.0) ** 2 for row in layers) / max(len(layers), 1)) ** 0.5,
        "params_ratio": report.params_before / report.params_after,
        "latency": None if report.latency is None else str(report.latency),
    }
    return (surgery.deploy(model, inputs), surgery.deploy(net, inputs), facts) if policy.deployed else (model, net, facts)


def measure(case: Case, runtime: str, options: argparse.Namespace) -> dict[str, Any]:
    """Times, ratios and spreads of one row."""
    sampling = {"threads": options.threads, "precision": options.precision, "seconds": options.seconds}
    if runtime in FILES:
        (row,) = surgery.benchmark(*case.written(), case.inputs, runtimes=[runtime], **sampling).rows
    else:
        (row,) = surgery.benchmark(case.before, case.after, case.inputs, runtimes=[runtime], **sampling).rows
    return row.to_data()


def rows(name: str, wanted: list[tuple[str, str]], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The wanted rows (policy, runtime) of one network; networks are cut and files written only as often as they must be."""
    model, shape = network(name)
    synthetic.fill(model).eval()
    inputs = torch.randn((options.batch, *shape[1:]), generator=torch.Generator().manual_seed(0))
    key: tuple[str, str] | None = None
    case: Case | str = ""
    with tempfile.TemporaryDirectory() as folder:
        for policy, runtime in wanted:
            row = {"network": name, "policy": policy, "runtime": runtime, "threads": options.threads, "batch": options.batch}
            row |= {"load_average": os.getloadavg()[0], "environment": environment([runtime])}
            if key != (key := (policy, runtime if POLICIES[policy].measured else "")):
                shutil.rmtree(Path(folder) / "case", ignore_errors=True)
                case = _case(model, inputs, POLICIES[policy], runtime, options.threads, Path(folder))
            if isinstance(case, str):
                yield row | {"refused": case}
                continue
            try:
                yield row | case.facts | measure(case, runtime, options)
            except surgery.SurgeryError as refused:
                yield row | case.facts | {"refused": str(refused)}


def _case(model: nn.Module, inputs: Tensor, policy: Policy, runtime: str, threads: int, folder: Path) -> Case | str:
    """The case, or why there is none. All policies share the file of the original but those that clean it."""
    try:
        before, after, facts = cut(model, inputs, policy, runtime, threads)
    except surgery.SurgeryError as refused:
        return str(refused)
    original = folder / "original.onnx" if before is model else folder / "case" / "before.onnx"
    return Case(before, after, inputs, facts, (original, folder / "case" / "after.onnx"))


def read(file: Path) -> list[dict[str, Any]]:
    """Rows that are there; a last line that a stopped run left incomplete is dropped."""
    found = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def append(row: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    whole = not file.exists() or file.read_bytes()[-1:] in (b"", b"\n")
    with file.open("a") as lines:
        lines.write(("" if whole else "\n") + json.dumps(row) + "\n")


def installed() -> list[str]:
    """Runtimes of the usual ones that can run here, those of CUDA where there is a device."""
    found = [name for name in BY_DEFAULT if name not in FILES or importlib.util.find_spec(name) is not None]
    return found + (["cuda", "cuda-graph"] if torch.cuda.is_available() else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", default=list(NETWORKS), help=f"these networks: {', '.join(NETWORKS)}, or a registry's")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES), metavar="NAME", help="; ".join(POLICIES))
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=installed(), metavar="NAME", help=", ".join(RUNTIMES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", type=float, default=0.01, help="half the width of the ratio's interval, as a share of it")
    parser.add_argument("--seconds", type=float, default=15.0, help="of sampling, a row at most")
    parser.add_argument("--table", action="store_true", help="make table and picture of the rows that are there, and measure nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    done = {tuple(row[name] for name in KEY) for row in read(options.out)}
    for name in [] if options.table else options.only:
        wanted = [(p, r) for p in options.policies for r in options.runtimes if (name, p, r, options.threads, options.batch) not in done]
        for row in rows(name, wanted, options) if wanted else ():
            append(row, options.out)
            print(json.dumps({key: value for key, value in row.items() if key != "environment"}), flush=True)
    found = read(options.out)
    options.out.with_suffix(".md").write_text(markdown(found))
    draw(found, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
