"""Is what would be uploaded complete, and does it work where nothing else is installed?

    python tools/check_package.py [--torch VERSION] [--extras NAME ...] [--keep FOLDER]

Builds wheel and sdist, looks into both, and installs each into a virtual environment of its own, outside of this tree: without extras (the bundled
network is cut, fused back, saved and loaded; what needs an extra says which), then with them (the networks are exported and pictures drawn). Start-up
of the command line is timed in turn with ``import torch``. Versions are those of ``constraints.txt``, torch the one that is named, if one is.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
SLOWEST_START = 1.3  # times `import torch`
PAIRS = 7
NEEDED = ("surgery/py.typed", "passes/py.typed", "surgery/zoo/weights/resnet20_cifar10.safetensors")
FOREIGN = ("tests/", "benchmarks/", "tools/", "examples/")

PLAIN = """
import surgery, torch
from surgery.zoo import make
model, shape = make("surgery:resnet20")
x = torch.randn(shape)
net = surgery.decompose(model, surgery.Budget(macs=0.5), example_inputs=x)
assert surgery.report(net).macs_after <= 0.5 * surgery.report(net).macs_before
surgery.save(net, "net")
again = surgery.load("net", make("surgery:resnet20")[0]).eval()
assert torch.equal(net.eval()(x), again(x))
back = surgery.reconstruct(net)
assert list(back.state_dict()) == list(model.state_dict())
assert torch.allclose(back(x), net(x), atol=1e-4)
print(surgery.report(net))
"""
WITHOUT = """
import surgery, torch
from surgery.zoo import make
model, shape = make("surgery:resnet20")
try:
    surgery.export_onnx(model, "net.onnx", torch.randn(shape))
except surgery.MissingExtra as error:
    assert "'.[export]'" in str(error), error
else:
    raise AssertionError("exported without the extra")
"""
WITH = """
import surgery, torch
from surgery.zoo import make
for name in ("surgery:resnet20", "torchvision:resnet18"):
    model, shape = make(name)
    x = torch.randn(shape)
    net = surgery.decompose(model, 0.5, example_inputs=x)
    print(surgery.export_onnx(net, "net.onnx", x))
    print(surgery.export_openvino(net, "net.xml", x))
    surgery.report(net).plot().savefig("net.png")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", metavar="VERSION", help="install this one")
    parser.add_argument("--extras", nargs="*", default=["export", "openvino", "plots", "zoo"], metavar="NAME", help="(default: %(default)s)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work there, and leave what was made")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.keep or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        constraints = constraints_for(options.torch, work)
        wheel, sdist = built(work)
        contents(wheel, sdist)
        for archive, extras in ((sdist, []), (wheel, options.extras)):
            here = Environment(work / archive.suffix.removeprefix("."), constraints)
            here.install(str(archive))
            here.run(f"{archive.name}: the main job", PLAIN)
            here.run(f"{archive.name}: an extra that is not there is named", WITHOUT)
            here.command("surgery --version", "--version")
            here.command("surgery summary surgery:resnet20", "summary", "surgery:resnet20")
            start_up(here)
            if extras:
                here.install(f"{archive}[{','.join(extras)}]")
                here.run(f"extras {', '.join(extras)}", WITH)


def constraints_for(torch: str | None, work: Path) -> Path:
    """The tested versions, with another torch where one is asked for: what goes with torch alone is then left open."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    if torch is not None:
        lines = [line for line in lines if not line.startswith(("torch==", "torchvision=="))] + [f"torch=={torch}"]
    file = work / "constraints.txt"
    file.write_text("\n".join(lines) + "\n")
    return file


def built(work: Path) -> tuple[Path, Path]:
    """Wheel and sdist, made from what git knows of this tree."""
    source, out = work / "source", work / "dist"
    source.mkdir(exist_ok=True)
    tree = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, tree):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    builder = work / "builder"
    subprocess.run([sys.executable, "-m", "venv", builder], check=True)
    subprocess.run([builder / "bin/pip", "install", "-q", "build"], check=True)
    subprocess.run([builder / "bin/python", "-m", "build", "--outdir", out, source], check=True, stdout=subprocess.DEVNULL)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def contents(wheel: Path, sdist: Path) -> None:
    """What must be in both, and what must not be in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        inside = archive.namelist()
    with tarfile.open(sdist) as tar:
        packed = [name.partition("/")[2] for name in tar.getnames()]
    for names, archive_name in ((inside, wheel.name), (packed, sdist.name)):
        missing = [name for name in NEEDED if name not in names]
        expect(not missing, f"{archive_name} has types and weights", f"it lacks {missing}")
    foreign = [name for name in inside if name.startswith(FOREIGN)]
    expect(not foreign, f"{wheel.name} has the two packages only", f"it has {foreign[:3]}")


class Environment:
    """A virtual environment, and an empty folder to work in."""

    def __init__(self, folder: Path, constraints: Path) -> None:
        self.folder, self.constraints = folder, constraints
        self.bin, self.cwd = folder / "venv/bin", folder / "empty"
        self.cwd.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder / "venv"], check=True)

    def install(self, what: str) -> None:
        subprocess.run([self.bin / "pip", "install", "-q", "-c", self.constraints, what], check=True)

    def run(self, what: str, code: str) -> None:
        self._checked(what, [self.bin / "python", "-c", code])

    def command(self, what: str, *arguments: str) -> None:
        self._checked(what, [self.bin / "surgery", *arguments])

    def _checked(self, what: str, command: Sequence[str | Path]) -> None:
        done = subprocess.run(command, cwd=self.cwd, capture_output=True, text=True, env=clean())
        expect(done.returncode == 0, what, done.stderr)


def start_up(here: Environment) -> None:
    """Start-up of the command line as a multiple of ``import torch``, run in turn."""

    def seconds(*command: str | Path) -> float:
        began = time.perf_counter()
        subprocess.run(command, cwd=here.cwd, check=True, capture_output=True, env=clean())
        return time.perf_counter() - began

    ours: Callable[[], float] = lambda: seconds(here.bin / "surgery", "--version")  # noqa: E731
    torchs: Callable[[], float] = lambda: seconds(here.bin / "python", "-c", "import torch")  # noqa: E731
    ours(), torchs()
    ratios = sorted(ours() / torchs() for _ in range(PAIRS))
    told = f"start-up is {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) times import torch"
    expect(statistics.median(ratios) < SLOWEST_START, told, f"it must be below {SLOWEST_START}")


def clean() -> dict[str, str]:
    """The environment without what would let this tree be imported."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def expect(holds: bool, what: str, otherwise: str) -> None:
    print(f"{'ok  ' if holds else 'FAIL'}  {what}", flush=True)
    if not holds:
        raise SystemExit(otherwise)


if __name__ == "__main__":
    main()
