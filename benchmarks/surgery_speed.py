"""How long does surgery itself take? ``surgery.decompose`` at EVBMF against the common stack and against the floor, interleaved in one run.

    python benchmarks/surgery_speed.py [--data ROOT] [--only NAME ...]

- floor: the float64 Gram matrix and one ``eigh`` of each mode of each layer, and nothing else.
- ours: ``surgery.decompose(model, "evbmf")`` on the model, the copy and the new modules included.
- common stack: EVBMF from numpy's singular value decomposition of each unfolding with all its vectors, as the published code has it, then tensorly's
  ``partial_tucker`` (a truncated singular value decomposition for 1x1 layers) at the same ranks and the same tolerance.
- thin stack: the same with torch's thin decomposition in the place of numpy's, as the better of its descendants have it.

Networks without trained weights get those of ``synthetic.py``, whose spectrum is printed with the ranks that follow. ROOT holds VDSR's and
ResNet-56's trained weights (``vdsr/vdsr_state_dict.pt`` and ``weights/resnet56-4bfd9763.th``); without it they are left out. Peak memory is taken
in a process of its own. Results go to ``benchmarks/results/surgery_speed.json`` after each network, the picture to ``surgery_speed.png`` beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import synthetic
import torch
from torch import Tensor, nn

import surgery
from passes.kinds import kind_of
from passes.linalg import HOOI_TOLERANCE
from surgery.benchmark import environment
from surgery.ranks import evbmf_rank
from surgery.zoo import load_weights, make

RESULTS = Path(__file__).parent / "results" / "surgery_speed.json"
ZOO = ("torchvision:resnet18", "torchvision:densenet121", "torchvision:resnet50", "torchvision:vgg16", "torchvision:wide_resnet101_2")
REAL = ("vdsr", "resnet56")
DEPTHS = (8, 16, 32, 64)
LARGE = "300M"  # 32 convolutions of 1024 channels
SLOW = {LARGE: (2, 0), "torchvision:wide_resnet101_2": (3, 1)}  # rounds, and rounds in which the stacks take part; each takes minutes
MEGABYTE = 2**20


class Vdsr(nn.Module):
    """The twenty 3x3 convolutions of VDSR (Kim et al. 2016), under the names of its shared weights."""

    def __init__(self) -> None:
        super().__init__()
        self.input = nn.Conv2d(1, 64, 3, padding=1, bias=False)
        self.residual_layer = nn.Sequential(*[nn.Sequential() for _ in range(18)])
        for block in self.residual_layer:
            block.add_module("conv", nn.Conv2d(64, 64, 3, padding=1, bias=False))
        self.output = nn.Conv2d(64, 1, 3, padding=1, bias=False)


def network(name: str, data: Path | None) -> nn.Module:
    """A network with its trained or synthetic weights."""
    if name == "vdsr":
        model: nn.Module = Vdsr()
        load_weights(model, data / "vdsr" / "vdsr_state_dict.pt")  # type: ignore[operator]
        return model
    if name == "resnet56":
        model, _ = make("surgery:resnet56")
        load_weights(model, data / "weights" / "resnet56-4bfd9763.th")  # type: ignore[operator]
        return model
    if name.startswith("depth"):
        return synthetic.fill(nn.Sequential(*[nn.Conv2d(256, 256, 3, bias=False) for _ in range(int(name.removeprefix("depth")))]))
    if name == LARGE:
        return synthetic.fill(nn.Sequential(*[nn.Conv2d(1024, 1024, 3, bias=False) for _ in range(32)]))
    return synthetic.fill(make(name)[0])


def convolutions(model: nn.Module) -> dict[str, Tensor]:
    return {name: m.weight.detach() for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1}


def unfoldings(weight: Tensor) -> list[Tensor]:
    """Of both channel modes, or the one matrix of a 1x1 layer; rows are the shorter side where that is possible."""
    if weight[0, 0].numel() == 1:
        matrix = weight.flatten(1)
        return [matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T]
    return [weight.movedim(mode, 0).flatten(1) for mode in (0, 1)]


def floor(weights: dict[str, Tensor]) -> None:
    for weight in weights.values():
        for matrix in unfoldings(weight.double()):
            torch.linalg.eigh(matrix @ matrix.T)


def published_values(matrix: Tensor) -> Tensor:
    """Singular values as the published EVBMF gets them: with a square matrix of right singular vectors that it then throws away."""
    return torch.from_numpy(np.linalg.svd(matrix.numpy())[1])


def thin_values(matrix: Tensor) -> Tensor:
    return torch.linalg.svd(matrix, full_matrices=False).S


def common_stack(weights: dict[str, Tensor], plan: surgery.Plan, values: Callable[[Tensor], Tensor]) -> tuple[dict[str, list[int]], dict[str, float]]:
    """Ranks and reconstruction errors of the common stack, factorizing what the plan factorizes at the plan's ranks."""
    import tensorly
    from tensorly.decomposition import partial_tucker

    ranks, errors = {}, {}
    for name, weight in weights.items():
        ranks[name] = [evbmf_rank(values(m), tuple(m.shape)) for m in unfoldings(weight)]
        decision = plan[name]
        if isinstance(decision, surgery.SVD):
            u, s, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
            rank = decision.rank
            errors[name] = float(((u[:, :rank] * s[:rank]) @ v[:rank] - weight.flatten(1)).norm() / weight.norm())
        elif isinstance(decision, surgery.Tucker):
            modes = [mode for mode, rank in enumerate(decision.ranks) if rank is not None]
            wanted = [rank for rank in decision.ranks if rank is not None]
            with tensorly.backend_context("pytorch", local_threadsafe=True):
                (core, factors), _ = partial_tucker(weight, rank=wanted, modes=modes, tol=HOOI_TOLERANCE)
                whole = tensorly.tenalg.multi_mode_dot(core, factors, modes=modes)
            errors[name] = float((whole - weight).norm() / weight.norm())
    return ranks, errors


def surface_gap(weights: dict[str, Tensor], net: nn.Module) -> list[float]:
    """For every layer cut by Tucker: how far the error surface is above the error that was reached, relative."""
    gaps = []
    for row in surgery.report(net).layers:
        if isinstance(row.factorization, surgery.Tucker) and None not in row.factorization.ranks and row.error:
            surface = surgery.ranks.error_surface(weights[row.name])
            gaps.append(float(surface[row.factorization.ranks]) / row.error - 1)
    return gaps


def timed(action: Callable[[], object]) -> tuple[float, object]:
    began = time.perf_counter()
    result = action()
    return time.perf_counter() - began, result


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def measure(name: str, data: Path | None, rounds: int, stack_rounds: int) -> dict[str, object]:
    """All of one network: times in turn, ratios of the same round, ranks, errors."""
    model = network(name, data)
    weights = convolutions(model)
    plan = surgery.plan(model)
    floor(weights)
    seconds: dict[str, list[float]] = {"floor": [], "ours": [], "thin_stack": [], "stack": []}
    ranks: dict[str, list[int]] = {}
    theirs: dict[str, float] = {}
    net: nn.Module = model
    for round_ in range(rounds):
        seconds["floor"].append(timed(lambda: floor(weights))[0])
        elapsed, made = timed(lambda: surgery.decompose(model, "evbmf"))
        seconds["ours"].append(elapsed)
        net = made  # type: ignore[assignment]
        if round_ < stack_rounds:
            seconds["thin_stack"].append(timed(lambda: common_stack(weights, plan, thin_values))[0])
            elapsed, (ranks, theirs) = timed(lambda: common_stack(weights, plan, published_values))  # type: ignore[misc]
            seconds["stack"].append(elapsed)
    report = surgery.report(net)
    ours = {row.name: row.error for row in report.layers if row.factorization is not None}
    row: dict[str, object] = {
        "network": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": len(weights),
        "cut": len(ours),
        "rounds": {key: len(values) for key, values in seconds.items()},
        "seconds": {key: spread(values) for key, values in seconds.items() if values},
        "ours_over_floor": spread([a / b for a, b in zip(seconds["ours"], seconds["floor"], strict=True)]),
        "plan": {key: list(d.ranks) for key, d in plan.items() if isinstance(d, surgery.Factorization)},
        "surface_above_reached": spread(gaps) if (gaps := surface_gap(weights, net)) else None,
    }
    if stack_rounds:
        for stack in ("stack", "thin_stack"):
            row[f"{stack}_over_ours"] = spread([a / b for a, b in zip(seconds[stack], seconds["ours"], strict=False)])
        row["largest_excess_error"] = max((ours[key] / theirs[key] - 1 for key in ours if theirs[key] > 0), default=None)  # type: ignore[operator]
        row["layers_whose_evbmf_ranks_differ"] = [key for key in weights if ranks[key] != raw_ranks(weights[key])]
    return row


def raw_ranks(weight: Tensor) -> list[int]:
    """EVBMF's ranks from our spectra."""
    from passes.linalg import spectrum

    return [evbmf_rank(spectrum(m, "any").values, tuple(m.shape)) for m in unfoldings(weight.double())]


def peak(name: str, data: Path | None) -> None:
    """In a process of its own: print what ``decompose`` needed beyond what was there before, and the bound on it (Linux)."""
    model = network(name, data)
    surgery.decompose(synthetic.fill(nn.Sequential(nn.Conv2d(64, 64, 3))), "evbmf")  # loads what is loaded once
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    net = surgery.decompose(model, "evbmf")
    extra = _status("VmHWM") - before
    copy = sum(p.numel() * p.element_size() for p in model.parameters())
    largest = max(8 * p.numel() for p in model.parameters())
    cut = sum(isinstance(row.factorization, surgery.Factorization) for row in surgery.report(net).layers)
    kinds = sorted({kind_of(row.factorization).factorization.kind for row in surgery.report(net).layers if row.factorization is not None})
    megabytes = {"extra_mb": extra, "model_mb": copy / MEGABYTE, "largest_layer_float64_mb": largest / MEGABYTE}
    print(json.dumps(megabytes | {"bound_mb": (copy + 8 * largest) / MEGABYTE, "cut": cut, "kinds": kinds}))


def _status(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def measured_peak(name: str, data: Path | None) -> object:
    command = [sys.executable, __file__, "--peak", name, *(["--data", str(data)] if data else [])]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def draw(rows: list[dict[str, object]], file: Path) -> None:
    """Time against parameters, one point a network and method; the networks that differ in depth alone are joined."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    looks = {
        "stack": ("tab:red", "s", "common stack"),
        "thin_stack": ("tab:orange", "D", "common stack, thin SVD"),
        "ours": ("tab:blue", "o", "surgery.decompose"),
        "floor": ("tab:gray", "^", "floor"),
    }
    for method, (colour, marker, label) in looks.items():
        for deep in (False, True):
            points = [
                (r["parameters"], r["seconds"][method])  # type: ignore[index]
                for r in rows
                if method in r["seconds"] and str(r["network"]).startswith("depth") == deep  # type: ignore[operator]
            ]
            if points:
                x, y = [p for p, _ in points], [s["median"] for _, s in points]
                bars = [[s["median"] - s["least"] for _, s in points], [s["most"] - s["median"] for _, s in points]]
                style = "-" if deep else ""
                text = f"{label}, 8 to 64 equal layers" if deep else label
                axes.errorbar(x, y, bars, color=colour, marker=marker, fillstyle="none" if deep else "full", linestyle=style, label=text, capsize=2)
    for r in rows:
        if not str(r["network"]).startswith("depth"):
            name = str(r["network"]).partition(":")[2] or str(r["network"])
            axes.annotate(name, (r["parameters"], r["seconds"]["ours"]["median"]), xytext=(4, -12), textcoords="offset points", fontsize=8)  # type: ignore[index,arg-type]
    axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel="seconds", title="Time to choose ranks by EVBMF and decompose, two CPU cores")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the trained weights of VDSR and ResNet-56")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these networks only; rows of others stay as they are in the results")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stack-rounds", type=int, default=3, help="in how many of the rounds the stacks take part")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--peak", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        peak(options.peak, options.data)
        return
    names = [*(REAL if options.data else ()), *(f"depth{n}" for n in DEPTHS), LARGE, *ZOO]
    old = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    rows = {row["network"]: row for row in old}
    for name in options.only or names:
        usual = (options.rounds, 0 if name.startswith("depth") else options.stack_rounds)
        rows[name] = measure(name, options.data, *SLOW.get(name, usual))
        rows[name]["memory"] = measured_peak(name, options.data)
        shown = (
            "network",
            "parameters",
            "cut",
            "ours_over_floor",
            "stack_over_ours",
            "thin_stack_over_ours",
            "largest_excess_error",
            "surface_above_reached",
            "memory",
        )
        print(json.dumps({key: rows[name].get(key) for key in shown}), flush=True)
        facts = {"decay": synthetic.DECAY, "noise": synthetic.NOISE, "seed": 0, "tolerance": HOOI_TOLERANCE}
        command = "python benchmarks/surgery_speed.py " + " ".join("ROOT" if a == str(options.data) else a for a in sys.argv[1:])
        found = {
            "command": command,
            "environment": environment(),
            "threads": torch.get_num_threads(),
            "synthetic": facts,
            "rows": list(rows.values()),
        }
        options.out.write_text(json.dumps(found, indent=1) + "\n")
        draw(list(rows.values()), options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
