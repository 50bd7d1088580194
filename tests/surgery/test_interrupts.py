"""Ctrl-C at any moment leaves the caller's model, optimizer, copies and files as they were, or as they are meant to be: never in between."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import surgery
from surgery.export.common import installed
from surgery.record import read_record
from surgery.undoing import undone_on_error, uninterrupted
from tests.interrupting import interrupted_at, lines_of, places

SURGERY = (
    "passes/module_host.py",
    "passes/graph_host.py",
    "passes/host.py",
    "passes/decompose.py",
    "passes/reconstruct.py",
    "surgery/decompose.py",
    "surgery/reconstruct.py",
    "surgery/fitting.py",
    "surgery/record.py",
    "surgery/training/followers.py",
    "surgery/training/optimizer.py",
)
FILES = ("surgery/checkpoint.py", "surgery/files.py", "surgery/export/common.py")
X = torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(3))


class Training:
    """A small network in training, with everything that belongs to it."""

    def __init__(self, *, graph: bool = False, cut: bool = False) -> None:
        torch.manual_seed(5)
        net = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3))
        self.model = surgery.trace(net, X) if graph else net
        if cut:
            self.model = surgery.decompose(self.model, {"0": (3, 2), "3": (2, 3)})
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.ema = AveragedModel(self.model)
        for _ in range(2):
            self.model(X).square().mean().backward()
            self.optimizer.step()
            self.ema.update_parameters(self.model)

    def everything(self):
        """Names and numbers of all that the caller holds."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        return {
            "model": {name: t.clone() for name, t in self.model.state_dict().items()},
            "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in self.model.named_parameters()},
            "ema": {name: t.clone() for name, t in self.ema.state_dict().items()},
            "groups": [[names.get(id(p), "not the model's") for p in group["params"]] for group in self.optimizer.param_groups],
            "state": {names.get(id(p), "not the model's"): copy.deepcopy(state) for p, state in self.optimizer.state.items()},
            "records": [read_record(self.model), read_record(self.ema.module)],
            "classes": [type(module).__name__ for module in self.model.modules()],
            "nodes": [str(node) for node in self.model.graph.nodes] if hasattr(self.model, "graph") else None,
        }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def cut(training):
    surgery.decompose(training.model, {"0": (3, 2), "3": (2, 3)}, optimizer=training.optimizer, also=training.ema, inplace=True)


def fuse(training):
    surgery.reconstruct(training.model, optimizer=training.optimizer, also=training.ema, inplace=True)


def corrected(training):
    batches = [torch.randn(4, 4, 7, 7, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    surgery.decompose(training.model, {"0": (3, 2)}, calibration=batches, optimizer=training.optimizer, also=training.ema, inplace=True)


@pytest.mark.parametrize(
    ("act", "options", "last", "others"),
    [(cut, {}, 16, 24), (fuse, {"cut": True}, 12, 6), (cut, {"graph": True}, 8, 8), (corrected, {}, 4, 6)],
    ids=["decompose", "reconstruct", "graph", "corrected"],
)
def test_a_training_is_never_half_cut(act, options, last, others):
    act(Training(**options))  # whatever is imported late is then there
    done = Training(**options)
    before, total = done.everything(), lines_of(SURGERY, lambda: act(done))
    after = done.everything()
    assert not same(before, after)
    for number in places(total, last, others):
        training = Training(**options)
        interrupted_at(number, SURGERY, lambda training=training: act(training))
        now = training.everything()
        assert same(now, before) or same(now, after), (number, total)
        if same(now, before) and number % 8 == 0:
            act(training)  # and all of it can still be done
            assert same(training.everything(), after), (number, total)


def test_a_schedule_that_is_loaded_is_not_half_rebuilt():
    schedule = surgery.DecompositionSchedule(decompose_at=0, ranks={"0": (3, 2), "3": (2, 3)})
    schedule.step(0, Training().model)
    state = schedule.state_dict()
    files = (*SURGERY, "surgery/checkpoint.py", "surgery/training/schedule.py")

    def load(training):
        fresh = surgery.DecompositionSchedule(decompose_at=0, ranks={"0": (3, 2), "3": (2, 3)})
        fresh.load_state_dict(state, training.model, training.optimizer, also=training.ema)

    shapes = lambda everything: [{n: t.shape for n, t in everything[key].items()} for key in ("model", "ema")] + everything["groups"]  # noqa: E731
    load(Training())
    done = Training()
    before, total = done.everything(), lines_of(files, lambda: load(done))
    after = shapes(done.everything())
    for number in places(total, 20, 12):
        training = Training()
        interrupted_at(number, files, lambda training=training: load(training))
        now = training.everything()
        assert same(now, before) or same(shapes(now), after), (number, total)


@pytest.mark.parametrize("existing", [True, False])
def test_a_saved_folder_is_the_old_one_or_the_new_one(existing, tmp_path):
    old, new = (surgery.decompose(nn.Sequential(nn.Conv2d(4, 6, 3)), {"0": ranks}) for ranks in ((3, 2), (2, 2)))

    def prepared(name):
        folder = tmp_path / name
        folder.mkdir()
        if existing:
            surgery.save(old, folder / "net")
        return folder

    first = prepared("first")
    total = lines_of(FILES, lambda: surgery.save(new, first / "net"))
    for number in places(total, 40, 10):
        folder = prepared(str(number))
        interrupted_at(number, FILES, lambda folder=folder: surgery.save(new, folder / "net"))
        left = sorted(path.name for path in folder.iterdir())
        assert left == ["net"] or (left == [] and not existing), (number, total)
        if left:
            report = surgery.report(surgery.load(folder / "net", nn.Sequential(nn.Conv2d(4, 6, 3))))
            assert report["0"].ranks in ((3, 2), (2, 2))


@pytest.mark.parametrize("existing", [True, False])
def test_files_that_belong_together_change_together(existing, tmp_path):
    def write(folder):
        with installed(folder / "net.onnx") as work:
            work.write_text("new")
            (work.parent / "net.data").write_text("new")

    def prepared(name):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("net.onnx", "net.data") if existing else ():
            (folder / file).write_text("old")
        return folder

    first = prepared("first")
    total = lines_of(FILES, lambda: write(first))
    for number in range(total):
        folder = prepared(str(number))
        interrupted_at(number, FILES, lambda folder=folder: write(folder))
        found = {path.name: path.read_text() for path in folder.iterdir()}
        allowed = [{"net.onnx": text, "net.data": text} for text in ("old", "new")] + ([] if existing else [{}])
        assert found in allowed, (number, total, found)


def test_a_plan_s_file_is_the_old_one_or_the_new_one(tmp_path):
    old, new = surgery.Plan({"a": surgery.SVD(1)}), surgery.Plan({"a": surgery.SVD(2)})
    path = tmp_path / "plan.json"
    old.save(path)
    total = lines_of(FILES, lambda: new.save(path))
    for number in range(total):
        old.save(path)
        interrupted_at(number, FILES, lambda: new.save(path))
        assert json.loads(path.read_text()) in (json.loads(old.to_json()), json.loads(new.to_json()))
        assert list(tmp_path.iterdir()) == [path]


def test_ctrl_c_waits_while_things_are_put_back():
    steps = []

    def slow():
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            steps.append("put back")

    before = signal.getsignal(signal.SIGINT)

    def failing():
        with undone_on_error() as undo:
            undo.later(slow)
            raise ValueError("first")

    with pytest.raises(KeyboardInterrupt):
        failing()
    assert len(steps) == 1000
    assert signal.getsignal(signal.SIGINT) is before
    with uninterrupted():
        pass
    with undone_on_error() as undo:
        undo.later(slow)  # nothing went wrong, so nothing is taken back
    assert len(steps) == 1000


def test_where_the_system_ends_the_process_at_ctrl_c_it_still_does():
    code = "\n".join(
        (
            "import signal",
            "from surgery.undoing import uninterrupted",
            "signal.signal(signal.SIGINT, signal.SIG_DFL)",
            "with uninterrupted():",
            "    signal.raise_signal(signal.SIGINT)",
            "    print('whole', flush=True)",
            "print('too far')",
        )
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "whole\n")
