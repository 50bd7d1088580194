"""Queues of training runs, and what is drawn of their logs: ``benchmarks/train_all.py``, ``training_tables.py``, ``rank_growth.py``."""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

import surgery

sys.path.insert(1, str(Path(__file__).parents[2] / "benchmarks"))

import rank_growth
import train_all
from training.checkpoint import folder_of, read_run, write_run
from training.paper import TABLES
from training.scenario import Scenario
from training.tables import Logged, logged, summary, table
from training_tables import publish

from tests.benchmarks.test_training import NETWORK, root, untimed  # noqa: F401  a fixture

ENTRY = {"network": NETWORK, "epochs": 3, "recipe": {"batch": 32, "ranks": 0.5, "guard": "none", "round_to": 1, "drops": [0.5]}}


def queue(*entries):
    return json.dumps([ENTRY | entry for entry in entries])


def test_a_queue_is_worked_off_in_order():
    later = {"scenarios": ["decompose-1"], "seeds": [0], "priority": 2, "label": "again"}
    jobs = train_all.jobs_of(queue(later, {"scenarios": ["after-2", "original"], "seeds": [1, 0]}))
    assert [(str(job.scenario), job.recipe.seed, job.label) for job in jobs] == [
        ("original", 0, ""),
        ("after-2", 0, ""),
        ("original", 1, ""),
        ("after-2", 1, ""),
        ("decompose-1", 0, "again"),
    ]
    assert jobs[0].keep == {1, 3}  # where the others go on
    assert jobs[2].keep == {3}
    assert jobs[0].recipe.drops == (0.5,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("{}", "a list"),
        ('[{"network": "surgery:vgg19"}]', "entry 1"),
        (queue({"recipe": {"learning_rate": 1}}), "learning_rate"),
        *((queue({"recipe": {name: 3}}), f"entry 1: a recipe has no .*{name}") for name in ("seed", "epochs", "network")),
        *((queue({"recipe": ENTRY["recipe"]} | wrong), "entry 1: expected a number for epochs") for wrong in ({"epochs": "30"}, {"seeds": 3})),
        (queue({"recipe": {"drops": 0.5}}), "entry 1: expected a number for epochs, and lists for seeds and drops"),
        (queue({"scenarios": ["decompose-3"]}), "3 epochs"),
        (
            queue({}, {"recipe": ENTRY["recipe"] | {"ranks": 0.7}}),
            "entries 1 and 2 both have decompose-1 of .* with seed 0, with ranks 0.5 and 0.7; .* label",
        ),
        (queue({"priority": 2}, {"epochs": 4, "label": "long"}), "entries 2 and 1 both have original .* epochs 4 and 3; .*--out"),
    ],
)
def test_queues_that_mean_nothing(text, message):
    with pytest.raises(surgery.SurgeryValueError, match=message):
        train_all.jobs_of(text)


def test_from_a_queue_to_tables_and_figures(root, tmp_path, capsys):  # noqa: F811
    runs, out = tmp_path / "runs", tmp_path / "out"
    jobs = train_all.jobs_of(queue({"scenarios": ["original", "decompose-1"]}))
    assert next(iter(train_all.status(jobs, runs))).endswith("3 epochs left, about 0 min")
    with train_all.alone(runs):
        with pytest.raises(surgery.SurgeryValueError, match="another process"), train_all.alone(runs):
            pass
        assert train_all.work(jobs, root, runs) == []
    assert len(capsys.readouterr().out.splitlines()) == 3 + 2
    assert train_all.work(jobs, root, runs) == []
    assert capsys.readouterr().out == ""
    assert all("done" in line for line in list(train_all.status(jobs, runs))[:-1])

    for recipe, scenarios in ({"weight_decay": 0.3}, ["original"]), ({"ranks": 0.3}, ["decompose-1"]):
        others = train_all.jobs_of(queue({"scenarios": scenarios, "recipe": ENTRY["recipe"] | recipe}))
        with pytest.raises(surgery.SurgeryValueError, match=f"holds a run with {next(iter(recipe))} .*, not 0.3"):
            train_all.work(others, root, runs)
    shorter = train_all.jobs_of(queue({"epochs": 2, "scenarios": ["original"]}))
    assert next(iter(train_all.status(shorter, runs))).endswith("done")
    with pytest.raises(surgery.SurgeryValueError, match="holds a run with epochs 3, not 2"):
        train_all.work(shorter, root, runs)

    publish(runs, out)
    (network,) = out.iterdir()
    whole, cut = json.loads((network / "summary.json").read_text())
    assert whole["top1_less_original"] == 0
    ends = [run.rows[-1] for run in logged(out)]
    assert cut["top1_less_original"] == pytest.approx(ends[1]["top1"] - ends[0]["top1"])
    assert cut["original_time_over_time"] == pytest.approx(ends[0]["seconds"] / ends[1]["seconds"])
    assert len((network / "table.md").read_text().splitlines()) == 4
    drawn = (network / "table.md").read_text()
    publish(Path(os.path.relpath(out)), out)  # its own results once more
    assert (network / "table.md").read_text() == drawn
    shutil.copytree(network / "decompose-1-seed0", tmp_path / "two" / "one" / "decompose-1-seed0")
    shutil.copytree(network / "decompose-1-seed0", tmp_path / "two" / "other" / "decompose-1-seed0")
    with pytest.raises(surgery.SurgeryValueError, match="more than one run decompose-1-seed0 of tiny"):
        publish(tmp_path / "two", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert not list(network.rglob("*.pt"))
    pytest.importorskip("matplotlib")
    assert (network / "figure.png").stat().st_size > 5000

    rank_growth.main([str(runs / "tiny" / "original-seed0"), "--out", str(tmp_path / "growth.json")])
    found = json.loads((tmp_path / "growth.json").read_text())
    rows = found["rows"]
    assert {row["epoch"] for row in rows} == {0, 1, 3}
    assert set(found["start_left"]["0"].values()) == {1.0}
    assert all(0.5 < left < 1 for left in found["start_left"]["3"].values())  # a few steps of small rate move it a little
    assert {row["epoch"] for row in rows if row["rule"] == rank_growth.WITHOUT} == {1, 3}  # at first there is nothing else
    run = runs / "tiny" / "original-seed0"
    write_run(run, read_run(run) | {"seed": 1})  # as another run
    with pytest.raises(SystemExit, match="seed 0, not 1"):
        rank_growth.main([str(run), "--out", str(tmp_path / "growth.json")])
    assert json.loads((tmp_path / "growth.json").read_text()) == found
    half = [row for row in rows if row["rule"] == "0.5"]
    assert all(row["parameters"] == cut["parameters"] and row["shares"] == pytest.approx({"0": 0.5, "3": 0.5}, abs=0.2) for row in half)


def test_runs_in_turn_are_the_same_runs(root, tmp_path, capsys):  # noqa: F811
    names = ["original", "decompose-1", "decompose-1-deeper-2", "after-1"]
    jobs = train_all.jobs_of(queue({"scenarios": names, "recipe": ENTRY["recipe"] | {"ranks": [0.8, 0.4]}}))
    assert train_all.work(jobs, root, tmp_path / "turns", in_turn=True) == []
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    order = [(row["epoch"], row["scenario"]) for row in told]
    assert order == [(1, names[0]), *((epoch, name) for epoch in (2, 3) for name in names[:3]), (4, names[3])]
    assert train_all.work(jobs, root, tmp_path / "one", in_turn=False) == []
    for turns, one in zip(logged(tmp_path / "turns"), logged(tmp_path / "one"), strict=True):
        assert untimed(turns.rows) == untimed(one.rows)
    cut = {row["scenario"]: row["parameters_after_cut"] for row in summary(logged(tmp_path / "one"))}
    assert cut["decompose-1-deeper-2"] == cut["decompose-1"] == cut["after-1"]  # of two cuts the last counts; the others are that one


def test_tables_have_the_papers_numbers_beside_ours(tmp_path):
    for name, seconds, top1 in (("original", 100.0, 90.0), ("decompose-10", 50.0, 89.5)):
        folder = folder_of(tmp_path, "surgery:vgg19", name, 0)
        write_run(folder, {"network": "surgery:vgg19", "scenario": name, "epochs": 1, "seed": 0, "label": ""})
        row = {"epoch": 1, "top1": top1, "top5": 99.0, "best_top1": top1, "parameters": 10, "seconds": seconds, "surgery_seconds": 0, "surgery": None}
        (folder / "log.jsonl").write_text(json.dumps(row) + "\n")
    rows = summary(logged(tmp_path))
    assert rows[1]["original_time_over_time"] == 2.0
    assert rows[1]["paper"]["original_time_over_time"] == pytest.approx(4.77 / 2.32)
    assert "| decompose-10 | 1 | 89.50 | 89.50 | -0.50 | 10 | 0.8 min | 2.00 | 91.69 | 91.39 | 749,000 | 2.32 | 2.06 |" in table("vgg19", rows)


def test_best_is_of_the_network_as_it_is_in_the_end_and_shared_epochs_are_known_by_their_time():
    def run(seed, *rows):
        return Logged(Path(), {"seed": seed}, [{"top1": top1, "seconds": seconds, "surgery": done} for top1, seconds, done in rows])

    whole = run(0, (80.0, 1.0, None), (90.0, 2.0, None), (88.0, 3.0, None))
    cut = run(0, (80.0, 1.0, None), (90.0, 2.0, None), (70.0, 2.5, "decomposed"), (85.0, 3.0, None), (84.0, 3.5, "nothing cut"))
    fused = run(0, *((row["top1"], row["seconds"], row["surgery"]) for row in cut.rows[:4]), (83.0, 4.0, "reconstructed"))
    assert [whole.best_top1, cut.best_top1, fused.best_top1] == [90.0, 85.0, 83.0]
    assert [cut.shared_with(whole), fused.shared_with(cut), fused.shared_with(whole)] == [2, 4, 2]
    assert whole.shared_with(run(1, (80.0, 1.0, None))) == 0


def test_results_that_do_not_name_their_run_are_read_as_they_are(tmp_path):
    for file in rank_growth.RESULTS.glob("rank_growth_*.json"):
        found = {name: value for name, value in json.loads(file.read_text()).items() if name != "run"}
        (tmp_path / file.name).write_text(json.dumps(found))
        assert rank_growth.known(tmp_path / file.name, {"network": "surgery:another", "seed": 7}) == found
        assert found["rows"]


def test_without_its_start_a_network_is_what_it_has_learnt():
    torch.manual_seed(0)
    start = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 5, 3))
    learnt, model = copy.deepcopy(start), copy.deepcopy(start)
    with torch.no_grad():
        for first, new, both in zip(start, learnt, model, strict=True):
            new.weight.normal_()
            new.weight -= (new.weight * first.weight).sum() / first.weight.square().sum() * first.weight
            both.weight.copy_(0.25 * first.weight + new.weight)
    assert rank_growth.start_left(model, start) == pytest.approx({"0": 0.25, "1": 0.25}, rel=1e-4)
    bare = rank_growth.without_start(model, start)
    assert all(torch.allclose(one.weight, other.weight, atol=1e-5) for one, other in zip(bare, learnt, strict=True))


def test_the_papers_scenarios_are_those_that_are_run():
    from training.scenario import PAPER

    assert {network.rpartition(":")[2]: set(names) for network, names in PAPER.items()} == {name: set(rows) for name, rows in TABLES.items()}
    assert all(str(Scenario.parse(name)) == name for rows in TABLES.values() for name in rows)
