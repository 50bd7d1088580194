"""Progress: on a terminal's stderr, where it was asked for, for all work that may take long; nothing anywhere else."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from torch import nn

import surgery
from surgery.cli import main
from surgery.progress import _shown, stage, tracked
from tests.networks import Branching

X = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(31))
BATCHES = [torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """To be put in the place of sys.stderr by the test: what a fixture puts there pytest takes away again."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    return Terminal()


def cut(small, tmp_path):
    options = {"calibration": BATCHES, "refine": surgery.Refine(epochs=1), "example_inputs": X}
    surgery.decompose(small, surgery.Budget(macs=0.6), progress=True, **options)


def timed(small, tmp_path):
    with surgery.show_progress():
        surgery.benchmark(small, small, X, runtimes=["eager"], repeats=8)


def written(small, tmp_path):
    with surgery.show_progress():
        surgery.export_torchscript(small, tmp_path / "net.pt", X)


def traded(small, tmp_path):
    with surgery.show_progress():
        surgery.tradeoff(small, shares=[0.6])


def trained(small, tmp_path):
    surgery.DecompositionSchedule(decompose_at=0, ranks=0.5, progress=True).step(0, small)


def captured(small, tmp_path):
    with surgery.show_progress():
        surgery.capture(Branching(), torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("work", "stages"),
    [
        (cut, ["running the example inputs", "calibrating", "choosing for", "decomposing", "correcting", "batch norms", "refining"]),
        (timed, ["timing in"]),
        (written, ["exporting", "checking net.pt"]),
        (traded, ["budget"]),
        (trained, ["planning", "decomposing"]),
        (captured, ["capturing"]),
        (lambda small, _: surgery.plan(small, 0.5, progress=True), ["planning"]),
        (lambda small, _: surgery.decompose(small, 0.5, guard="latency", example_inputs=X, progress=True), ["shapes in eager"]),
    ],
    ids=["cut", "timed", "written", "traded", "trained", "captured", "planned", "guarded"],
)
def test_what_takes_long_says_what_it_is_at(small, work, stages, terminal, tmp_path, monkeypatch):
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "stderr", terminal)
    work(small, tmp_path)
    shown = terminal.getvalue()
    for each in stages:
        assert each in shown, each
    assert shown.rstrip().endswith("\x1b[2K\x1b[?25h")  # nothing is left on the terminal, and the cursor is back


def test_nothing_is_shown_without_a_terminal_or_unasked(small, monkeypatch):
    for stream, wanted in ((io.StringIO(), True), (Terminal(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        surgery.decompose(small, 0.5, progress=wanted)
        assert stream.getvalue() == ""


def test_the_command_line_keeps_results_on_stdout(terminal, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["plan", "tests.networks:Small", "--input-shape", "1,3,12,12", "--json"]) == 0
    assert surgery.Plan.from_json(capsys.readouterr().out)
    assert "planning" in terminal.getvalue()


def test_names_are_not_read_as_markup(terminal, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal)
    with surgery.show_progress():
        assert list(tracked(["[red]a[/red]", "[/]"], "at", name=str)) == ["[red]a[/red]", "[/]"]
        with stage("working") as step:
            step("[bold]b")
            _shown.get().bars.refresh()
            step("[/]")
            _shown.get().bars.refresh()
    assert "working [bold]b" in terminal.getvalue()
    assert "working [/]" in terminal.getvalue()


def test_an_interrupt_leaves_a_terminal_that_can_be_used(terminal, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal)
    model = nn.Sequential(nn.Conv2d(4, 4, 3))

    def interrupted(site, spectra):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        surgery.decompose(model, interrupted, progress=True)
    assert terminal.getvalue().rstrip().endswith("\x1b[?25h")
    terminal.truncate(0)
    surgery.decompose(model, 0.5, progress=True)  # and the next one is shown again
    assert "decomposing" in terminal.getvalue()
