"""Correction in one pass: passes that stop on the way give what passes that begin anew give, whatever the network's code does."""

from __future__ import annotations

import copy
import signal
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional

import surgery
from surgery import correction
from surgery.lockstep import OutOfStep, Pass
from tests.networks import Small, Twice

IMAGES = torch.randn(24, 3, 12, 12, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


class Remembers(nn.Module):
    """Keeps what later layers need on itself, works in place, and has as many passes of its layers counted."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.shortcut = self.first(x)
        self.seen += 1
        y = self.second(self.shortcut.relu()).relu_()
        return self.third(y + self.shortcut.clone())


class Turns(nn.Module):
    """Which layer comes first depends on the numbers; one of them is not always called."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three, self.four = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))

    def forward(self, x):
        y = self.two(self.one(x).relu()) if x.mean() > 0 else self.one(self.two(x).relu())
        return self.four(self.three(y) if x.mean() < 1 else y)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv1d(4, 6, 3), nn.Conv1d(4, 6, 3, padding=1)

    def forward(self, sound, gain):
        return {"left": self.left(sound) * gain, "right": functional.relu(self.right(sound))}


def graph_of_small():
    model = Small().double().eval()
    return surgery.trace(model, IMAGES[:2])


CASES = {
    "small": (lambda: Small().double(), list(IMAGES.split([10, 6, 8]))),
    "a graph": (graph_of_small, list(IMAGES.split(12))),
    "sizes": (lambda: Small().double(), [IMAGES[:8], IMAGES[8:, :, :10, :9].contiguous()]),
    "remembers": (lambda: Remembers().double(), list(IMAGES.split(8))),
    "in turns": (lambda: Turns().double(), [IMAGES + 0.5, IMAGES - 0.5, IMAGES + 2]),
    "called twice": (lambda: Twice().double(), [torch.randn(6, 8, 8, 8, dtype=torch.float64), torch.randn(3, 8, 8, 8, dtype=torch.float64)]),
    "named": (lambda: Named().double(), [{"sound": torch.randn(5, 4, 9, dtype=torch.float64), "gain": torch.tensor(2.0)} for _ in range(3)]),
}


@pytest.mark.parametrize("case", CASES)
def test_one_pass_gives_what_beginning_anew_for_every_chain_gives(case, monkeypatch):
    torch.manual_seed(1)
    build, batches = CASES[case]
    model = build()
    ranks = {"re:.*": 0.5}
    threads = threading.active_count()
    fast = surgery.decompose(model, ranks, calibration=batches)
    assert threading.active_count() == threads
    monkeypatch.setattr(correction, "HELD", 0)  # no memory for stopped passes: one group for each chain, as there are few
    monkeypatch.setattr(correction, "Pass", None)
    slow = surgery.decompose(model, ranks, calibration=batches)
    plain = surgery.decompose(model, ranks)
    assert any(not torch.allclose(a, b) for a, b in zip(fast.parameters(), plain.parameters(), strict=True))
    for (name, a), b in zip(fast.state_dict().items(), slow.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11), name
    errors = [{row.name: row.output_error for row in surgery.report(net).layers if row.output_error is not None} for net in (fast, slow)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-9)


def test_each_layer_is_run_once_a_batch(monkeypatch):
    counts = {"calls": 0}

    class Counted(nn.Conv2d):
        def forward(self, x):
            counts["calls"] += 1
            return super().forward(x)

    model = nn.Sequential(*(m for _ in range(20) for m in (nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())), Counted(3, 3, 1))
    model[0] = Counted(3, 3, 3, padding=1)  # kept: it runs in every pass that begins
    net = surgery.decompose(model, {f"{2 * i}": (2, 2) for i in range(1, 20)})
    chains = {f"{2 * i}": f"{2 * i}.expand" for i in range(1, 20)}
    counts["calls"] = 0
    correction.correct(model, net, chains, IMAGES.float().split(8))
    assert (
        counts["calls"] == 2 + 2 * 3
    )  # the first batch whole, to learn the order; three batches through both networks, no further than the last chain


def test_memory_is_bounded(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 3)).double()
    _, needed, draws = correction._first_pass(["0", "2"], IMAGES.split(6), model)
    assert not draws
    whole = IMAGES.numel() * 8
    assert 16 / 3 * whole <= needed <= 40 / 3 * whole  # what the first layer gives, and no more than twice that with all inputs
    monkeypatch.setattr(correction, "_memory", lambda _: needed)
    monkeypatch.setattr(correction, "Pass", None)
    assert surgery.report(surgery.decompose(model, {"2": (2, 2)}, calibration=IMAGES.split(6)))["2"].output_error > 0


def test_buffers_and_threads_of_all_passes_count(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    monkeypatch.setattr(correction, "_memory", lambda _: 2.0**20)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    assert correction._fit(model, 0.0, 32)  # 64 passes of 16 threads
    assert not correction._fit(model, 0.0, 33)
    model.register_buffer("table", torch.zeros(2**13))  # 32 kB in each of 64 passes is more than a quarter of what there is
    assert not correction._fit(model, 0.0, 32)


def test_memory_is_that_of_the_container(monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(correction, "CONTAINER", (limit, tmp_path / "none"))
    whole = correction._memory(nn.Linear(1, 1))
    limit.write_text("max\n")
    assert correction._memory(nn.Linear(1, 1)) == whole > 2.0**27
    limit.write_text("134217728\n")
    assert correction._memory(nn.Linear(1, 1)) == 2.0**27


@pytest.mark.parametrize("what", ["threads", "memory"])
def test_where_passes_cannot_be_held_they_begin_anew(what, monkeypatch):
    """The system gives no more threads, or memory is less than was foretold: the same numbers on the other way."""
    model, batches = Small().double().eval(), list(IMAGES.split(8))
    wanted = surgery.decompose(model, {"re:.*": 0.5}, calibration=batches)
    tried = []

    class Fails(Pass):
        def reach(self, name):
            tried.append(name)
            if what == "memory":
                with correction.model_errors(model, batches[0], "calibration"):
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return super().reach(name)

    def start(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(correction, "Pass", Fails)
    if what == "threads":
        monkeypatch.setattr(threading.Thread, "start", start)
    net = surgery.decompose(model, {"re:.*": 0.5}, calibration=batches)
    assert tried
    for (name, a), b in zip(net.state_dict().items(), wanted.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11), name


class Noisy(nn.Module):
    """Draws random numbers in eval mode too, as ``functional.dropout`` does where nobody says otherwise."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.second(functional.dropout(self.first(x).relu()))


@pytest.mark.parametrize("refine", [None, surgery.Refine(epochs=1)])
def test_both_networks_draw_the_same_random_numbers(refine):
    torch.manual_seed(2)
    model = Noisy().double().eval()
    net = surgery.decompose(model, {"second": (8, 8)}, calibration=list(IMAGES.split(8)), refine=refine)  # full ranks: nothing is to be mended
    torch.testing.assert_close(surgery.reconstruct(net).second.weight, model.second.weight, rtol=1e-3, atol=1e-4)
    assert surgery.report(net)["second"].output_error < 1e-3


class Interrupted(nn.Module):
    """A network whose second layer, at the given call, sends the process what Ctrl-C sends, or raises."""

    def __init__(self, at, how):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.at, self.how = at, how
        self.calls = [0]  # shared by all copies

    def __deepcopy__(self, memo):
        memo[id(self.calls)] = self.calls
        twin = type(self)(self.at, self.how)
        twin.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items()})
        return twin

    def forward(self, x):
        y = self.second(self.first(x))
        self.calls[0] += 1
        if self.calls[0] == self.at:
            if self.how == "signal":
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            else:
                raise RuntimeError("the data ran out")
        return self.third(y)


@pytest.mark.parametrize(("how", "error"), [("signal", KeyboardInterrupt), ("raise", surgery.SurgeryValueError)])
@pytest.mark.parametrize("inplace", [False, True])
def test_an_interrupt_on_the_way_leaves_the_model_as_it_was_and_no_thread(how, error, inplace):
    model = Interrupted(None, how).double()
    batches = IMAGES.split(8)
    surgery.decompose(model, {"re:.*": 0.5}, calibration=batches)
    count = model.calls[0]  # calibration, the first pass, and two networks in step; the last of them by three batches
    model.calls[0], model.at = 0, count - 1
    before = {k: v.clone() for k, v in model.state_dict().items()}
    threads = threading.active_count()
    with pytest.raises(error):
        surgery.decompose(model, {"re:.*": 0.5}, calibration=batches, inplace=inplace)
    assert model.calls[0] >= count - 1
    assert threading.active_count() == threads
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_pass_says_what_it_meets():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3)).double()
    ahead = Pass(model, ["0", "2"], IMAGES, outputs=True)
    with torch.no_grad():
        assert torch.equal(ahead.reach("0"), model[0](IMAGES))
        model[2].weight.zero_()  # what comes next is run with what is there then
        assert torch.equal(ahead.reach("2"), model[2].bias[:, None, None].expand(24, 5, 8, 8))
    assert ahead.reach("2") is None
    ahead.close()
    unbegun = Pass(model, ["0"], IMAGES, outputs=False)
    unbegun.close()
    other = Pass(model, ["0", "2"], IMAGES, outputs=False)
    with pytest.raises(OutOfStep):
        other.reach("2")
    other.close()


def test_a_pass_runs_as_its_caller_would():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        one = Pass(model, ["0"], torch.randn(2, 3), outputs=True)
        assert one.reach("0").dtype == torch.bfloat16
        one.close()
