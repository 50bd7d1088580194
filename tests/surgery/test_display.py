"""What people see beside the page: tables that fit, HTML in notebooks, figures."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import surgery
from surgery.benchmarking.result import Benchmark, RuntimeResult
from surgery.benchmarking.table import benchmark_table
from surgery.tables import change, count, explain_table, plan_table, print_table, render, report_table, summary_table, tradeoff_table
from tests.networks import Small
from tests.surgery.page.test_page import HOSTILE, Page, closed_off

X = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(31))


@pytest.fixture(scope="module")
def deep():
    """A network with names as long as those of real ones, and millions of parameters."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.transformer_blocks = nn.ModuleDict({"attention_projection": nn.Sequential(nn.Conv2d(256, 512, (3, 3), stride=2, dilation=2))})
            self.downsample = nn.Conv2d(512, 64, 3)

        def forward(self, x):
            return self.downsample(self.transformer_blocks["attention_projection"](x))

    torch.manual_seed(0)
    return surgery.decompose(Block(), {"re:trans.*": (100, 90)}, example_inputs=torch.randn(1, 256, 20, 20))


def lines_at_80(table):
    text = render(table, width=80)
    assert all(len(line) <= 80 for line in text.splitlines()), text
    assert "…" not in text
    return "".join(text.split())


def test_no_table_loses_anything_at_80_columns(deep):
    report = surgery.report(deep)
    names = [row.name for row in report.layers]
    for table in (report_table(report), summary_table(report)):
        text = lines_at_80(table)
        for row in report.layers:
            assert row.layer.replace(" ", "") in text
    text = lines_at_80(report_table(report))
    costs = [change(each.params_before, each.params_after) for each in (*report.layers, report)]
    costs += [change(each.macs_before, each.macs_after) for each in (*report.layers, report)]
    for part in ("100,90", f"{report.layers[0].error:.3f}", f"{report.compression:.2f}x", f"{report.speedup:.2f}x", *costs):
        part = part.replace(" ", "")
        assert part in text, part
    plan = surgery.Plan({name: surgery.Keep("because " * 30) for name in names})
    assert lines_at_80(plan_table(plan)).count("because") == 60
    original = Small().eval()
    found = surgery.tradeoff(original, example_inputs=X, shares=[0.6])
    assert "0.60" in lines_at_80(tradeoff_table(found))
    near = surgery.explain(original, "conv2", surgery.plan(original, 0.5), example_inputs=X)
    assert lines_at_80(explain_table(near)).count("tucker") == len(near)


def test_a_wide_terminal_has_a_row_a_layer(deep):
    lines = render(report_table(surgery.report(deep)), width=160).splitlines()
    assert lines[0].split()[:3] == ["layer", "was", "ranks"]
    assert "Conv2d 512->64 3x3" in next(line for line in lines if line.startswith("downsample"))


def test_a_terminal_gets_its_own_width(deep, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    print_table(report_table(surgery.report(deep)))
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert 70 < max(map(len, shown.splitlines())) <= 80
    assert "ranks error" in shown


def test_notebooks_show_tables(small, tmp_path):
    net = surgery.decompose(small, {"conv2": (8, 4)}, example_inputs=X)
    report, plan = surgery.report(net), surgery.plan(small, 0.5)
    exported = surgery.export_torchscript(net, tmp_path / "net.pt", X)
    measured = surgery.benchmark(small, net, X, runtimes=["eager"], repeats=8)
    for shown, part in ((report, "8, 4"), (plan, "tucker"), (exported, "agrees to"), (measured, "interleaved")):
        page = Page(shown._repr_html_())
        assert part in page.text
        assert closed_off(page)
        assert any(tag == "table" for tag, _ in page.elements)
    rows = sum(tag == "tr" for tag, _ in Page(report._repr_html_()).elements)
    assert rows == len(report.layers) + 2
    assert "±" in render(benchmark_table(measured), width=80)


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_are_text_in_notebooks(name):
    page = Page(surgery.Plan({name: surgery.Keep(name)})._repr_html_())
    assert closed_off(page)
    assert {tag for tag, _ in page.elements} <= {"table", "thead", "tbody", "tr", "th", "td"}


def test_a_figure_has_a_bar_for_every_layer(small, tmp_path):
    pytest.importorskip("matplotlib")
    net = surgery.decompose(small, {"conv2": (8, 4)}, example_inputs=X)
    report = surgery.report(net, before=small, example_inputs=X)
    figure = report.plot()
    costs, errors, curve = figure.axes
    assert [bar.get_width() for bar in costs.patches] == [r.macs_before for r in report.layers] + [r.macs_after for r in report.layers]
    assert [bar.get_width() for bar in errors.patches] == [row.error or 0.0 for row in report.layers]
    assert [label.get_text() for label in costs.get_yticklabels()] == [row.name for row in report.layers]
    assert tuple(curve.lines[1].get_xydata()[0]) == pytest.approx(report.place)
    figure.savefig(tmp_path / "report.pdf")
    assert len(surgery.report(surgery.decompose(small, 0.5)).plot().axes) == 2  # parameters, where nothing else is known
    surgery.tradeoff(small, example_inputs=X, shares=[0.6]).save_picture(tmp_path / "tradeoff.png")
    assert (tmp_path / "tradeoff.png").stat().st_size > 1000


def test_without_matplotlib_the_extra_is_named(small, monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "matplotlib" else found(name, *rest))
    with pytest.raises(surgery.MissingExtra, match=r"plot needs matplotlib: pip install '\.\[plots\]' in a checkout"):
        surgery.report(small).plot()
    with pytest.raises(surgery.MissingExtra, match=r"'\.\[plots\]'"):
        surgery.tradeoff(small, shares=[0.6]).save_picture(tmp_path / "x.png")


def test_a_benchmark_whose_rows_tell_no_sizes_has_no_table_of_them():
    row = RuntimeResult(runtime="eager", before_ms=2.0, after_ms=1.0, time_ratio=2.0, time_ratio_low=1.9, time_ratio_high=2.1, pairs=9, settled=True)
    found = Benchmark(rows=(row,), macs_before=None, macs_after=None, threads=1, input_shapes=((1,),), environment={})
    assert "memory before" not in str(found)
    sized = replace(row, runtime="onnxruntime", file_bytes_before=2_000_000, file_bytes_after=1_000_000)
    told = str(replace(found, rows=(row, sized)))
    assert "memory before" in told
    assert told.partition("memory before")[2].count("eager") == 0


@pytest.mark.parametrize(
    ("number", "told"), [(999, "999"), (999_400, "999k"), (999_999, "1M"), (1_000_000, "1M"), (999_999_999, "1G"), (853_000, "853k")]
)
def test_counts_that_round_up_take_the_next_unit(number, told):
    assert count(number) == told


def test_the_page_names_a_kind_once(small):
    net = surgery.decompose(small, {"conv2": surgery.Channel(4), "conv1": surgery.Tucker(4, 2)})
    text = Page(surgery.report(net).to_html()).text
    assert "→ channel 4" in text
    assert "→ tucker 4, 2" in text
