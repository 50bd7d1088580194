"""Shared fixtures: real data where it is at hand, and small networks."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.networks import Small

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("SURGERY_DATA", ROOT.parent / "shared" / "data"))

LONG = "SURGERY_LONG" in os.environ  # tries more of what is drawn by chance, and what is slow
settings.register_profile(
    "suite",
    deadline=None,
    max_examples=2000 if LONG else 40,
    derandomize=not LONG,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.load_profile("suite")


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells start what runs in the background; tests of Ctrl-C need to be told
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite-golden", action="store_true", help="write the golden texts anew instead of comparing with them")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def golden(request: pytest.FixtureRequest):
    """Compare a text with tests/golden/NAME, or write it there with --rewrite-golden."""

    def check(name: str, text: str) -> None:
        path = ROOT / "tests" / "golden" / name
        if request.config.getoption("--rewrite-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        assert text == path.read_text(), f"differs from {path}; see --rewrite-golden"

    return check


def data(name: str) -> Path:
    """A file of real data; the test is skipped where it is absent."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"needs {name} of the real data in {DATA} (set SURGERY_DATA)")
    return path


@pytest.fixture
def small() -> Small:
    """A small network in eval mode: plain, strided, pointwise, and depthwise convolutions, batch norm, a shortcut, a linear layer."""
    return Small().eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 12, 12)


@pytest.fixture(scope="session")
def vdsr_weights() -> dict[str, torch.Tensor]:
    return torch.load(data("vdsr/vdsr_state_dict.pt"), weights_only=True)
