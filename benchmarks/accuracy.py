"""What a cut costs before any training: the peers' way beside ours, on trained networks.

    python benchmarks/accuracy.py --data ROOT --cifar FOLDER [--only TEXT] [--quick]

- ResNet-20 and ResNet-56 on CIFAR-10: calibrated on 1,024 training images without their labels, three disjoint draws; top-1 on all 10,000 test
  images.
- VDSR: calibrated on photographs that scikit-image ships, scaled down and up again (x3); PSNR on Set5 x3. Without scikit-image it is left out.

Ways: ``fraction`` (Tucker at one fraction of the ranks everywhere, the weights alone: what peers do), ``weights`` (a budget by the weights alone),
``data`` (the same budget with ``calibration=``), ``auto`` (all kinds), ``refine`` (``data`` polished). ROOT holds the trained weights (``weights/``,
``vdsr/``), FOLDER the official ``cifar-10-batches-py``. Every row is written to ``benchmarks/results/accuracy.json`` when it is done, and a row that
is there is not measured again; the picture is ``accuracy.png`` beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cifar10
import numpy as np
import torch
from surgery_speed import Vdsr
from torch import Tensor, nn
from torch.nn import functional
from train_resnet20 import accuracy

import surgery
from surgery import Budget, Refine
from surgery.benchmark import environment
from surgery.zoo import load_weights, make

RESULTS = Path(__file__).parent / "results" / "accuracy.json"
IMAGES, DRAWS, BATCH = 1024, 3, 128
SHARES = (0.5, 0.7)
WAYS = ("fraction", "weights", "data", "auto", "refine")
EPOCHS = {"resnet20": 10, "resnet56": 10, "vdsr": 20}
SCALE = 3
PATCH = 96


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A trained network: its calibration batches for each draw, an example input, and what is measured (higher is better)."""

    name: str
    model: nn.Module
    inputs: Tensor
    draws: tuple[list[Tensor], ...]
    measure: Callable[[nn.Module], float]
    unit: str


class Residual(nn.Module):
    """VDSR as it is run: what its layers predict is added to its input (Kim et al. 2016)."""

    def __init__(self, body: Vdsr) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.body.input(x))
        for block in self.body.residual_layer:
            y = functional.relu(block.conv(y))  # type: ignore[operator]
        out: Tensor = x + self.body.output(y)
        return out


def cifar_case(name: str, data: Path, cifar: Path, quick: bool) -> Case:
    model, shape = make(f"surgery:{name}")
    load_weights(model, next((data / "weights").glob(f"{name}-*.th")))
    train, _ = cifar10.read(cifar, ("data_batch_1",))
    images, labels = cifar10.read(cifar, cifar10.TEST_FILES)
    count = 2000 if quick else len(images)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    draws = tuple(list(train[order[IMAGES * k : IMAGES * (k + 1)]].split(BATCH)) for k in range(DRAWS))
    return Case(
        name=name,
        model=model.eval(),
        inputs=torch.zeros(shape),
        draws=draws,
        measure=lambda net: accuracy(net, images[:count], labels[:count]),
        unit="% top-1",
    )


def vdsr_case(data: Path, quick: bool) -> Case | None:
    photographs = list(_photographs())
    if not photographs:
        return None
    body = Vdsr()
    load_weights(body, data / "vdsr" / "vdsr_state_dict.pt")
    pairs = [_luma_pair(path) for path in sorted((data / "vdsr" / "Set5").glob("*_GT.bmp"))]
    patches = torch.cat([_patches(photograph) for photograph in photographs])
    order = torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))
    size = min(64, len(patches) // DRAWS)
    draws = tuple(list(patches[order[size * k : size * (k + 1)]].split(8)) for k in range(DRAWS))
    return Case(
        name="vdsr",
        model=Residual(body).eval(),
        inputs=torch.zeros(1, 1, PATCH, PATCH),
        draws=draws,
        measure=lambda net: psnr(net, pairs[:1] if quick else pairs),
        unit="dB on Set5 x3",
    )


def _photographs() -> Iterator[np.ndarray[Any, Any]]:
    """Colour photographs (H, W, 3) uint8 that scikit-image has with it."""
    try:
        from skimage import data as photographs
    except ImportError:
        return
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        try:
            yield getattr(photographs, name)()[..., :3]
        except Exception as error:  # scikit-image fetches some of them, where there is a network
            print(f"{name} is left out: {error}", file=sys.stderr)


def _luma(picture: np.ndarray[Any, Any]) -> Tensor:
    """Y of BT.601 in [0, 1], as MATLAB's rgb2ycbcr has it."""
    weights = np.array([65.481, 128.553, 24.966]) / 255
    return torch.from_numpy((picture.astype(np.float64) @ weights + 16) / 255).float()


def _patches(photograph: np.ndarray[Any, Any]) -> Tensor:
    """(N, 1, PATCH, PATCH): the luma, scaled down and up again by bicubic interpolation, in pieces."""
    luma = _luma(photograph)
    height, width = (n // PATCH * PATCH for n in luma.shape)
    whole = luma[:height, :width][None, None]
    small = functional.interpolate(whole, scale_factor=1 / SCALE, mode="bicubic", antialias=True)
    blurred = functional.interpolate(small, size=(height, width), mode="bicubic")
    return blurred.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).reshape(-1, 1, PATCH, PATCH)


def _luma_pair(path: Path) -> tuple[Tensor, Tensor]:
    from PIL import Image

    wanted = _luma(np.asarray(Image.open(path).convert("RGB")))
    given = _luma(np.asarray(Image.open(path.with_name(f"{path.stem}_scale_{SCALE}.bmp")).convert("RGB")))
    return given[None, None], wanted[: given.shape[0], : given.shape[1]]  # cut to a multiple of the scale


def psnr(net: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Mean over the pictures, on the luma, without a border of SCALE pixels."""
    values = []
    for given, wanted in pairs:
        with torch.inference_mode():
            got = net(given)[0, 0].clamp(0, 1)
        gap = (got - wanted)[SCALE:-SCALE, SCALE:-SCALE].double()
        values.append(-10 * float(torch.log10(gap.square().mean())))
    return statistics.fmean(values)


def cut(case: Case, way: str, share: float, draw: int) -> tuple[nn.Module, float]:
    """The decomposed network and the seconds that the surgery took."""
    started = time.perf_counter()
    if way == "fraction":
        net = _fraction(case, share)
    else:
        options: dict[str, Any] = {"method": "auto"} if way == "auto" else {}
        if way != "weights":
            options["calibration"] = case.draws[draw]
        if way == "refine":
            options["refine"] = Refine(epochs=EPOCHS[case.name])
        net = surgery.decompose(case.model, Budget(macs=share), example_inputs=case.inputs, **options)
    return net, time.perf_counter() - started


def _fraction(case: Case, share: float) -> nn.Module:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with weights/ and vdsr/")
    parser.add_argument("--cifar", type=Path, required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--only", default="", help="measure only rows whose name holds this text, for example resnet56/0.5/data")
    parser.add_argument("--quick", action="store_true", help="one draw, 2,000 test images, one picture; nothing is written")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows: dict[str, Any] = {}
    if options.out.exists() and not options.quick:
        rows = json.loads(options.out.read_text())["rows"]
    for case in cases(options):
        for share in SHARES:
            for way in WAYS:
                for draw in range(1 if options.quick or way in ("fraction", "weights") else DRAWS):
                    name = f"{case.name}/{share}/{way}/{draw}"
                    if name in rows or options.only not in name:
                        continue
                    before = rows.get(f"{case.name}/original", {}).get("score")
                    if before is None:
                        before = case.measure(case.model)
                        rows[f"{case.name}/original"] = {"score": before, "unit": case.unit}
                    net, seconds = cut(case, way, share, draw)
                    report = surgery.report(net)
                    rows[name] = {
                        "score": case.measure(net),
                        "before": before,
                        "unit": case.unit,
                        "macs": report.macs_after / report.macs_before,  # type: ignore[operator]
                        "params": report.params_after / report.params_before,
                        "seconds": seconds,
                        "calibrated": report.calibrated,
                    }
                    print(name, json.dumps(rows[name]), flush=True)
                    if not options.quick:
                        _write(options.out, rows)
    if not options.quick and rows:
        _draw(options.out.with_suffix(".png"), rows)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for name in ("resnet20", "resnet56"):
        if options.only.partition("/")[0] in ("", name):
            yield cifar_case(name, options.data, options.cifar, options.quick)
    if options.only.partition("/")[0] in ("", "vdsr"):
        case = vdsr_case(options.data, options.quick)
        if case is None:
            print("vdsr is left out: scikit-image is not installed", file=sys.stderr)
        else:
            yield case


def _write(out: Path, rows: dict[str, Any]) -> None:
    told = {"command": "python benchmarks/accuracy.py --data ROOT --cifar FOLDER", "environment": environment(), "images": IMAGES, "draws": DRAWS}
    out.write_text(json.dumps(told | {"rows": rows}, indent=1) + "\n")


def _draw(out: Path, rows: dict[str, Any]) -> None:
    """Points lost, for each network and budget, a bar a way: the mean over draws, with the least and the most."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = sorted({name.rsplit("/", 2)[0] for name in rows if name.count("/") == 3})
    figure, axes = pyplot.subplots(1, len(groups), figsize=(2.6 * len(groups), 3.6), squeeze=False)
    for axis, group in zip(axes[0], groups, strict=True):
        for place, way in enumerate(WAYS):
            lost = [row["before"] - row["score"] for name, row in rows.items() if name.startswith(f"{group}/{way}/")]
            if lost:
                mean = statistics.fmean(lost)
                axis.bar(place, mean, yerr=[[mean - min(lost)], [max(lost) - mean]])
                axis.text(place, mean, f"{mean:.2f}", ha="center", va="bottom", fontsize=8)
        axis.set_title(group.replace("/", ", MACs x "), fontsize=9)
        axis.set_xticks(range(len(WAYS)), WAYS, rotation=60, fontsize=8)
        axis.set_ylabel("lost (points, dB)")
    figure.tight_layout()
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    main()
