"""Training runs of ``benchmarks/training``: scenarios, what they share, and going on where they were cut off."""

from __future__ import annotations

import itertools
import json
import pickle
import platform
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import surgery
from surgery.zoo.torchvision_ops import import_torchvision

sys.path.insert(1, str(Path(__file__).parents[2] / "benchmarks"))

import train_cifar
import train_imagenet
from training import engine
from training.checkpoint import folder_of, read_log, read_run
from training.command import train
from training.data import Folder, InMemory
from training.engine import Diverged, run
from training.recipe import Recipe
from training.scenario import Scenario, branch_points, usual

NETWORK = "tests.benchmarks.test_training:tiny"
TIMES = {"surgery_seconds", "train_seconds", "evaluation_seconds", "seconds", "load_average"}
RECIPE = Recipe(network=NETWORK, epochs=4, batch=32, rate=0.05, ranks=0.4, guard="macs", round_to=1, batch_norm=1, warm_up=3)
TWICE = replace(RECIPE, ranks=[0.8, 0.4])  # for two cuts
ALL = tuple(Scenario.parse(name) for name in ("original", "decompose-1", "decompose-1-reconstruct-3", "after-2"))


def tiny():
    layers = [nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder as of CIFAR-10 with 260 + 60 pictures of noise whose mean tells the class."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "cifar-10-batches-py").mkdir()
    draw = np.random.default_rng(0)
    for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
        count = 60 if name == "test_batch" else 52
        labels = draw.integers(0, 10, count)
        pixels = np.clip(draw.normal(20 + 22 * labels[:, None], 30, (count, 3072)), 0, 255).astype(np.uint8)
        with (folder / "cifar-10-batches-py" / name).open("wb") as file:
            pickle.dump({b"data": pixels, b"labels": labels.tolist()}, file)
    return folder


@pytest.fixture(scope="module")
def pictures(root):
    return InMemory.cifar10(root, batch=32, device="cpu")


class Counted:
    """Pictures that count the epochs that were trained on them."""

    def __init__(self, inner):
        self.inner, self.test, self.sample, self.facts, self.epochs = inner, inner.test, inner.sample, inner.facts, []

    def train(self, seed, epoch):
        self.epochs.append(epoch)
        return self.inner.train(seed, epoch)


def weights(runs, scenario, file="last.pt"):
    return torch.load(folder_of(runs, NETWORK, scenario, 0) / file, weights_only=True)["model"]


def untimed(rows):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def test_every_picture_once_an_epoch_shifted_and_flipped(pictures):
    seen = list(pictures.train(3, 0))
    assert [len(x) for x, _ in seen] == [32] * 8
    again = list(pictures.train(3, 0))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(seen, again, strict=True))
    assert not torch.equal(seen[0][0], next(pictures.train(3, 1))[0])
    x, _ = seen[0]
    assert x.is_contiguous(memory_format=torch.channels_last)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    small = InMemory(pictures.padded[:12], pictures.labels[:12], pictures.test_pixels, pictures.test_labels, 32)
    ((x, y),) = small.train(0, 0)  # fewer than a batch
    pixels = ((x * std + mean) * 255).round().to(torch.uint8)
    views = small.padded.permute(0, 3, 1, 2).unfold(2, 32, 1).unfold(3, 32, 1)[:, 0]  # of the red of all pictures
    used = []
    for picture, label in zip(pixels[:, 0], y, strict=True):
        plain, flipped = ((views == p).flatten(-2).all(-1).nonzero()[:, 0].tolist() for p in (picture, picture.flip(1)))
        (found,) = plain or flipped
        assert small.labels[found] == label
        used.append((found, bool(flipped)))
    assert sorted(number for number, _ in used) == list(range(12))
    assert len({flipped for _, flipped in used}) == 2


def test_scenarios_by_name():
    deeper = "decompose-5-deeper-12"
    for name in ("original", "decompose-10", "decompose-10-reconstruct-190", deeper, deeper + "-reconstruct-28", "after-40"):
        assert str(Scenario.parse(name)) == name
    for name in (
        "decompose",
        "after-",
        "decompose-5-reconstruct-5",
        "decompose-5-deeper-5",
        deeper + "-reconstruct-12",
        "original-deeper-3",
        "after-0",
    ):
        with pytest.raises(surgery.SurgeryValueError, match=name):
            Scenario.parse(name)
    with pytest.raises(surgery.SurgeryValueError, match="epoch 190"):
        Scenario.parse("decompose-10-reconstruct-190").check(190)
    with pytest.raises(surgery.SurgeryValueError, match="epoch 12"):
        Scenario.parse(deeper).check(12)
    assert branch_points(ALL, 4) == {ALL[0]: {1, 4}, ALL[1]: {3}}
    assert branch_points([Scenario.parse(deeper + "-reconstruct-28")], 30) == {Scenario.parse(deeper): {28}}
    assert branch_points([Scenario.parse(deeper)], 30) == {ALL[0]: {5}}
    assert len(usual("surgery:vgg19", 200)) == 8
    assert usual("surgery:vgg19", 15) == ("original", "decompose-1", "decompose-1-reconstruct-14", "after-3")
    assert usual("surgery:vgg19", 8) == ("original", "decompose-1", "decompose-1-reconstruct-7", "after-2")
    assert usual("surgery:vgg19", 2) == ("original", "decompose-1", "after-1")
    assert usual("surgery:vgg19", 1) == ("original", "after-1")
    for epochs in range(1, 60):
        for name in usual("surgery:resnet56", epochs):
            Scenario.parse(name).check(epochs)


def test_the_rate_drops_at_shares_of_the_run():
    recipe = Recipe(network=NETWORK, epochs=8)
    assert [recipe.rate_of(Scenario(fine_tune=2), e) for e in range(10)] == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2 + [0.01, 0.001])


def test_scenarios_train_once_what_they_share(pictures, tmp_path):
    counted = Counted(pictures)
    keep = branch_points(ALL, 4)
    original, cut, back, after = (run(RECIPE, s, counted, tmp_path, keep=keep.get(s, ())) for s in ALL)
    assert [e for e in counted.epochs if e < 100] == [0, 1, 2, 3, 1, 2, 3, 3, 4, 5]
    assert [len(rows) for rows in (original, cut, back, after)] == [4, 4, 4, 6]
    assert cut[:1] == original[:1]
    assert back[:3] == cut[:3]
    assert after[:4] == original
    whole, small = original[0]["parameters"], cut[1]["parameters"]
    assert small < whole
    assert [row["parameters"] for row in cut] == [whole, small, small, small]
    assert [row["parameters"] for row in back] == [whole, small, small, whole]
    assert [row["surgery"] for row in back] == [None, "decomposed", None, "reconstructed"]
    assert cut[1]["macs"] < original[1]["macs"] == back[3]["macs"]
    for rows in (original, cut, back, after):
        assert rows == read_log(folder_of(tmp_path, NETWORK, ALL[(original, cut, back, after).index(rows)], 0))
        assert all(a["seconds"] < b["seconds"] for a, b in itertools.pairwise(rows))
        assert rows[-1]["best_top1"] == max(row["top1"] for row in rows)
        assert rows[-1]["top5"] >= rows[-1]["top1"] > 10
        last = rows[-1]
        assert last["seconds"] == pytest.approx(sum(last[name] for name in TIMES - {"seconds", "load_average"}), abs=0.02)
    assert cut[-1]["surgery_seconds"] > 0 == original[-1]["surgery_seconds"]
    report = json.loads((folder_of(tmp_path, NETWORK, ALL[1], 0) / "report.json").read_text())
    chains = {layer["name"] for layer in report["layers"] if layer["status"] == "decomposed"}
    assert chains == set(surgery.Plan.load(folder_of(tmp_path, NETWORK, ALL[1], 0) / "plan.json"))
    assert len(chains) == 2


def test_a_network_is_cut_deeper_later(pictures, tmp_path):
    rows = run(TWICE, Scenario.parse("decompose-1-deeper-2-reconstruct-3"), pictures, tmp_path)
    assert [row["surgery"] for row in rows] == [None, "decomposed", "decomposed", "reconstructed"]
    whole, first, second, back = (row["parameters"] for row in rows)
    assert whole == back > first > second
    after = run(TWICE, ALL[3], pictures, tmp_path)
    assert after[-1]["parameters"] == second  # one cut takes the last ranks


@pytest.mark.parametrize("scenario", [*ALL, *(Scenario.parse("decompose-1-deeper-2" + back) for back in ("", "-reconstruct-3"))], ids=str)
def test_a_run_that_was_cut_off_goes_on_to_the_bit(pictures, tmp_path, scenario):
    recipe = RECIPE if scenario.deeper_at is None else TWICE
    at_once = run(recipe, scenario, pictures, tmp_path / "at once")
    for until in range(1, len(at_once) + 1):
        rows = run(recipe, scenario, pictures, tmp_path / "in parts", until=until)
    assert untimed(rows) == untimed(at_once)
    one, other = weights(tmp_path / "at once", scenario), weights(tmp_path / "in parts", scenario)
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_branch_equals_a_run_from_the_beginning(pictures, tmp_path):
    alone = run(RECIPE, ALL[1], pictures, tmp_path / "alone")
    run(RECIPE, ALL[0], pictures, tmp_path, keep={1})
    assert untimed(run(RECIPE, ALL[1], pictures, tmp_path)) == untimed(alone)
    assert all(torch.equal(a, b) for a, b in zip(weights(tmp_path, ALL[1]).values(), weights(tmp_path / "alone", ALL[1]).values(), strict=True))


def test_a_run_that_was_stopped_between_checkpoint_and_log_is_complete_again(pictures, tmp_path):
    rows = run(RECIPE, ALL[0], pictures, tmp_path)
    log = folder_of(tmp_path, NETWORK, ALL[0], 0) / "log.jsonl"
    log.write_text("".join(line + "\n" for line in log.read_text().splitlines()[:-1]))
    assert run(RECIPE, ALL[0], pictures, tmp_path) == rows
    assert read_log(log.parent) == rows


def test_a_checkpoint_that_was_not_kept_costs_time_only(pictures, tmp_path):
    run(RECIPE, ALL[0], pictures, tmp_path)
    counted = Counted(pictures)
    assert len(run(RECIPE, ALL[1], counted, tmp_path)) == 4
    assert [e for e in counted.epochs if e < 100] == [0, 1, 2, 3]


def test_runs_of_two_recipes_do_not_mix(pictures, tmp_path):
    run(RECIPE, ALL[0], pictures, tmp_path, until=1)
    with pytest.raises(surgery.SurgeryValueError, match=r"rate 0\.05, not 0\.2"):
        run(replace(RECIPE, rate=0.2), ALL[0], pictures, tmp_path)
    run(replace(RECIPE, ranks=0.9), ALL[0], pictures, tmp_path, until=2)  # what an original does not depend on
    run(RECIPE, ALL[1], pictures, tmp_path, until=2)
    with pytest.raises(surgery.SurgeryValueError, match=r"ranks 0\.4, not 0\.9"):
        run(replace(RECIPE, ranks=0.9), ALL[1], pictures, tmp_path)
    run(replace(RECIPE, ranks=0.9), ALL[1], pictures, tmp_path, label="wide", until=2)


def test_runs_on_other_pictures_do_not_mix(pictures, tmp_path):
    run(RECIPE, ALL[0], pictures, tmp_path, until=1)
    fewer = InMemory(pictures.padded, pictures.labels, pictures.test_pixels[:59], pictures.test_labels[:59], 32)
    with pytest.raises(surgery.SurgeryValueError, match="test_pictures 60, not 59"):
        run(RECIPE, ALL[0], fewer, tmp_path)
    with pytest.raises(surgery.SurgeryValueError, match="test_pictures 60, not 59"):
        run(RECIPE, ALL[1], fewer, tmp_path)  # which would go on from there
    file = folder_of(tmp_path, NETWORK, ALL[0], 0) / "last.pt"
    state = torch.load(file, weights_only=True)
    torch.save(state | {"facts": {name: value for name, value in state["facts"].items() if name not in pictures.facts()}}, file)
    assert len(run(RECIPE, ALL[0], pictures, tmp_path, until=2)) == 2  # a run from before pictures were noted goes on
    assert torch.load(file, weights_only=True)["facts"] == state["facts"]


def test_a_run_names_the_machines_that_trained_it(pictures, tmp_path, monkeypatch):
    def facts(scenario):
        return read_run(folder_of(tmp_path, NETWORK, scenario, 0))

    def move(name):
        monkeypatch.setattr(engine, "environment", lambda: {"processor": name})

    move("first")
    run(RECIPE, ALL[0], pictures, tmp_path, keep={1}, until=2)
    move("second")
    run(RECIPE, ALL[0], pictures, tmp_path, until=2)  # nothing to do
    assert facts(ALL[0])["environment"] == {"processor": "first"}
    assert "later_machines" not in facts(ALL[0])
    run(RECIPE, ALL[0], pictures, tmp_path, until=3)
    moved = {"epochs_before": 2, "environment": {"processor": "second"}}
    for until in (3, 4):
        run(RECIPE, ALL[0], pictures, tmp_path, keep={4}, until=until)
        assert facts(ALL[0])["environment"] == {"processor": "first"}
        (later,) = facts(ALL[0])["later_machines"]
        assert {name: later[name] for name in moved} == moved
    assert later["threads"] == torch.get_num_threads()
    run(RECIPE, ALL[3], pictures, tmp_path, until=5)  # has all epochs of both
    assert facts(ALL[3])["later_machines"] == [later]
    run(RECIPE, ALL[1], pictures, tmp_path, until=2)  # has one epoch of the first, and goes on here
    assert facts(ALL[1])["environment"] == {"processor": "first"}
    assert [machine["epochs_before"] for machine in facts(ALL[1])["later_machines"]] == [1]


def test_each_network_is_compiled_from_nothing(pictures, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: done.append("reset"))
    monkeypatch.setattr(torch, "compile", lambda model: done.append("compile") or model)
    run(replace(RECIPE, compiled=True), ALL[1], pictures, tmp_path, until=3)
    assert done == ["reset", "compile"] * 2


def test_a_rule_that_keeps_everything_is_told_apart(pictures, tmp_path):
    rows = run(replace(RECIPE, ranks=1.0), ALL[2], pictures, tmp_path)
    assert [row["surgery"] for row in rows] == [None, "nothing cut", None, "reconstructed"]
    assert len({row["parameters"] for row in rows}) == 1


def test_a_run_that_diverges_says_so(pictures, tmp_path):
    with pytest.raises(Diverged, match=r"original: the loss of epoch 1 is"):
        run(replace(RECIPE, rate=1e30), ALL[0], pictures, tmp_path)


def test_the_command_trains_what_it_is_told(root, tmp_path, capsys):
    text = f"--data {root} --out {tmp_path} --network {NETWORK} --epochs 2 --batch 32 --subset 64 --scenarios after-1 original decompose-1"
    options = train_cifar.parser().parse_args([*text.split(), "--ranks", "0.5", "--guard", "none", "--bf16", "--contiguous"])
    train(options, InMemory.cifar10(root, 32, "cpu", 64))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["scenario"], row["epoch"]) for row in rows] == [("original", 1), ("original", 2), ("decompose-1", 2), ("after-1", 3)]
    facts = json.loads((folder_of(tmp_path, NETWORK, "after-1", 0) / "run.json").read_text())
    assert (facts["ranks"], facts["bf16"], facts["channels_last"], facts["subset"]) == (0.5, True, False, 64)
    assert facts["memory_kept"] == (platform.libc_ver()[0] == "glibc")
    options = train_cifar.parser().parse_args(f"--data {root} --out {tmp_path / 'none'} --epochs 2 --scenarios original decompose-2".split())
    with pytest.raises(surgery.SurgeryValueError, match="decompose-2"):
        train(options, InMemory.cifar10(root, 32, "cpu"))
    for wrong, message in (("--method tuckr", "tuckr"), ("--guard steps", "steps"), ("--round-to 0", "round_to"), ("--chain-rate 2", "rate")):
        options = train_cifar.parser().parse_args(f"--data {root} --out {tmp_path / 'none'} --network {NETWORK} --epochs 2 {wrong}".split())
        with pytest.raises(surgery.SurgeryError, match=message):
            train(options, InMemory.cifar10(root, 32, "cpu"))
    assert not (tmp_path / "none").exists()  # nothing was trained before it was said
    with pytest.raises(surgery.SurgeryValueError, match="cifar-10-batches-py"):
        InMemory.cifar10(tmp_path, 32, "cpu")
    with pytest.raises(surgery.SurgeryValueError, match="subset"):
        InMemory.cifar10(root, 32, "cpu", 31)


@pytest.fixture
def image():
    try:
        import_torchvision()
    except surgery.MissingExtra as error:
        pytest.skip(str(error))
    return pytest.importorskip("PIL.Image")


def fill(image, folder, *names, count=1):
    """Pictures of noise in a folder for each class."""
    draw = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for k in range(count):
            image.fromarray(draw.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / name / f"{k}.png")


def test_a_folder_of_pictures(tmp_path, image):
    for part, count in (("train", 5), ("val", 2)):
        fill(image, tmp_path / part, "cat", "dog", count=count)
    options = train_imagenet.parser().parse_args(["--data", str(tmp_path), "--out", str(tmp_path / "runs"), "--batch", "4"])
    assert (options.epochs, options.network) == (90, "torchvision:resnet50")
    pictures = Folder(tmp_path, batch=4, device="cpu", size=32, workers=0)
    rows = run(Recipe(network=NETWORK, epochs=2, batch=4, ranks=0.5, guard="macs", round_to=1), Scenario(1), pictures, tmp_path / "runs")
    assert len(rows) == 2
    assert rows[1]["parameters"] < rows[0]["parameters"]
    assert all(torch.equal(a, b) for a, b in zip(pictures.sample(2), pictures.sample(2), strict=True))
    with pytest.raises(surgery.SurgeryValueError, match="'train'"):
        Folder(tmp_path / "runs", 4, "cpu")
    smaller = Folder(tmp_path, batch=4, device="cpu", size=24, workers=0)
    with pytest.raises(surgery.SurgeryValueError, match="size 32, not 24"):
        run(Recipe(network=NETWORK, epochs=2, batch=4, ranks=0.5, guard="macs", round_to=1), Scenario(1), smaller, tmp_path / "runs")


def test_labels_of_both_parts_of_a_folder_are_the_same(tmp_path, image):
    fill(image, tmp_path / "train", "cat", "dog", "emu")
    fill(image, tmp_path / "val", "emu", "dog")
    pictures = Folder(tmp_path, batch=4, device="cpu", size=32, workers=0)
    ((_, labels),) = pictures.test()
    assert labels.tolist() == [1, 2]
    pickle.dumps(pictures._val)  # what a process that reads is given, where processes are not forked
    before = pictures.facts()
    assert (before["classes"], before["train_pictures"], before["test_pictures"]) == (3, 3, 2)
    (tmp_path / "train" / "cat").rename(tmp_path / "train" / "ant")
    assert Folder(tmp_path, 4, "cpu", 32, 0).facts() != before


def test_a_folder_whose_parts_do_not_fit_is_refused_before_it_is_trained_on(tmp_path, image):
    fill(image, tmp_path / "train", "cat", "dog")
    fill(image, tmp_path, "val")  # as ImageNet's is downloaded, pictures and no classes
    with pytest.raises(surgery.SurgeryValueError, match=r"val/CLASS/ with the pictures"):
        Folder(tmp_path, 4, "cpu")
    (tmp_path / "val" / "dog").mkdir()
    with pytest.raises(surgery.SurgeryValueError, match=r"dog.*val/CLASS/ with the pictures"):
        Folder(tmp_path, 4, "cpu")
    fill(image, tmp_path / "val", "gnu", "yak")
    fill(image, tmp_path / "val" / "dog", "deeper")
    with pytest.raises(surgery.SurgeryValueError, match=r"the class 'gnu' and 1 others, which .*train has not"):
        Folder(tmp_path, 4, "cpu")
    for subset in (0, -5, 3):
        with pytest.raises(surgery.SurgeryValueError, match=rf"subset: expected one batch \(2\) to all of the 2 pictures, got {subset}"):
            Folder(tmp_path, 2, "cpu", subset=subset)
