"""The page of a report: whole, closed off from the network, and true to the report whatever layers are called."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import surgery
from passes.outline import places
from surgery.cli import main
from surgery.cost.outcome import LatencyOutcome
from surgery.page.markup import element, text
from tests.networks import Small

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(31))
VOID = {"meta", "br"}
FETCHING = {"script", "link", "img", "iframe", "object", "embed", "base", "form", "audio", "video", "image", "use", "foreignobject", "a"}


class Page(HTMLParser):
    """Reads a page, insists that every element is closed in order, and remembers what is in it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def closed_off(page: Page) -> bool:
    tags = {tag for tag, _ in page.elements}
    names = {key for _, attributes in page.elements for key in attributes}
    return not tags & FETCHING and not {key for key in names if key.startswith("on") or key in ("href", "src", "xlink:href", "action")}


@pytest.fixture
def net(small):
    return surgery.decompose(small, {"conv1": (6, None), "conv2": (8, 4), "mix": 5, "head": 2}, example_inputs=X)


def test_the_page_says_what_the_report_says(net):
    report = surgery.report(net)
    page = Page(report.to_html())
    assert closed_off(page)
    for row in report.layers:
        assert row.name in page.text
        assert row.error is None or f"{row.error:.3f}" in page.text
        assert row.reason is None or row.reason in page.text
    for part in ("4 of 6", "14.5k →", "1.11M →", "Passes that ran: Decompose", "tucker 8, 4", "not named"):
        assert part in page.text, part


def test_bars_are_as_long_as_what_they_show():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3, bias=False), nn.Conv2d(16, 16, 3, bias=False))
    report = surgery.report(surgery.decompose(model, {"1": (4, 4)}, example_inputs=torch.randn(1, 8, 9, 9)))
    bars = [a["style"] for tag, a in Page(report.to_html()).elements if tag == "i" and "style" in a]
    widths = [float(style.removeprefix("width:").removesuffix("%")) for style in bars]
    first, second = report.layers
    most = second.macs_before
    assert widths[0] == pytest.approx(100 * first.macs_before / most, abs=0.01)
    assert widths[2:4] == pytest.approx([100, 100 * second.macs_after / most], abs=0.01)
    assert widths[6] == pytest.approx(100 * second.error, abs=0.01)


def test_times_of_layers_stand_beside_their_macs(small, net):
    found = surgery.benchmark(small, net, X, runtimes=("eager",), repeats=8, layers=True)
    row = {layer.name: layer for layer in found.layers}["conv2"]
    sure = replace(row, before_ms=8.0, after_ms=2.0, spread=0.5)
    page = Page(
        surgery.report(net, benchmark=replace(found, layers=(replace(row, name="mix", before_ms=1.0, after_ms=1.1, spread=0.2), sure))).to_html()
    )
    assert closed_off(page)
    told = found.rows[0]
    assert f"{told.time_ratio:.2f} times as fast ({told.time_ratio_low:.2f} to {told.time_ratio_high:.2f}): {told.verdict}" in page.text
    assert "8 -> 2 ms, 4.00x" in page.text
    assert "1 -> 1.1 ms, no verdict" in page.text
    assert "0 to 1. Times are of each layer by itself." in page.text
    widths = [a["style"] for tag, a in page.elements if tag == "i" and "style" in a]
    assert {"width:100.00%", "width:25.00%", "width:12.50%", "width:13.75%"} <= set(widths)
    with pytest.raises(surgery.SurgeryValueError, match="times of a layer 'absent'"):
        surgery.report(net, benchmark=replace(found, layers=(replace(row, name="absent"),)))
    assert "Time in" not in Page(surgery.report(net).to_html()).text
    data = surgery.report(net, benchmark=found).to_data()
    assert [layer["name"] for layer in data["benchmark"]["layers"]] == [layer.name for layer in found.layers]


def test_times_on_the_page_from_the_command_line(tmp_path, capsys):
    path = tmp_path / "page.html"
    assert main(["decompose", "surgery:resnet20", "--ranks", '{"layer3.0.conv1": [16, 8]}', "--html", str(path), "--time", "eager", "--json"]) == 0
    assert {"Time in eager, batch 1", "Time in eager"} <= set(Page(path.read_text(encoding="utf-8")).texts)
    assert [layer["name"] for layer in json.loads(capsys.readouterr().out)["benchmark"]["layers"]] == ["layer3.0.conv1"]


def test_a_page_without_the_times_that_cannot_be_had(tmp_path, capsys):
    path = tmp_path / "page.html"
    assert main(["report", "surgery:resnet20", "--html", str(path), "--time", "eager"]) == 0
    assert "without times: nothing was cut" in capsys.readouterr().err
    assert "not decomposed" in Page(path.read_text(encoding="utf-8")).text


HOSTILE = [
    '<script>alert("1")</script>',
    "'\"><img src=x onerror=alert(1)>",
    "&lt;b&gt;",
    "a\x00b\x1b[31m",
    "\ud800",
    "</style><b>",
    "名前",
    "x" * 300,
]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_are_text(name, tmp_path):
    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module(name, nn.Conv2d(3, 4, 3))

        def forward(self, x):
            return getattr(self, name)(x)

    model = Holds()
    report = surgery.report(surgery.decompose(model, {name: surgery.Keep(f"because of {name}")}))
    report.save_html(tmp_path / "page.html", title=name)
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert closed_off(page)
    shown = "".join("\N{REPLACEMENT CHARACTER}" if ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 else c for c in name)
    assert sum(part == shown for part in page.texts) >= 2  # the title and the layer
    assert f"because of {shown}" in page.texts


def test_an_untouched_model_and_one_without_layers_have_pages(small):
    assert "not decomposed" in Page(surgery.report(small).to_html()).text
    assert "0 of 0" in Page(surgery.report(nn.ReLU()).to_html()).text


def test_attributes_are_escaped_and_none_is_left_out():
    assert element("i", None, "<", class_='a"b', data_label=None) == '<i class="a&quot;b">&lt;</i>'
    assert text(element("b")) == "<b></b>"


def test_the_command_line_writes_it_and_still_reports(capsys, tmp_path):
    torch.manual_seed(0)
    surgery.save(surgery.decompose(Small(), {"conv2": (8, 4)}), tmp_path / "net")
    arguments = ["report", str(tmp_path / "net"), "--architecture", "tests.networks:Small", "--input-shape", "1,3,12,12"]
    assert main([*arguments, "--html", str(tmp_path / "out.html")]) == 0
    shown = capsys.readouterr()
    assert "conv2" in shown.out
    assert "without trade-off" in shown.err  # another Small has other weights
    page = Page((tmp_path / "out.html").read_text(encoding="utf-8"))
    assert "tucker 8, 4" in page.text
    assert "reduce: Conv2d 16->4 1x1" in page.text
    assert main([*arguments, "--html", str(tmp_path / "absent" / "out.html")]) == 1
    assert "absent" in capsys.readouterr().err


def test_the_command_line_cuts_and_shows_what_other_budgets_cost(capsys, tmp_path):
    arguments = ["decompose", "tests.networks:Small", "--input-shape", "1,3,12,12", "--ranks", "0.5", "--html", str(tmp_path / "out.html")]
    assert main(arguments) == 0
    assert capsys.readouterr().err == ""
    assert "This network:" in Page((tmp_path / "out.html").read_text(encoding="utf-8")).text


def test_a_page_that_cannot_be_written_leaves_the_one_before(net, tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("before")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        surgery.report(net).save_html(path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_spectra_are_those_of_the_weight_before_and_the_ranks_are_marked(small, net, tmp_path):
    report = surgery.report(net)
    weight = small.conv2.weight.detach().double()
    for outline, unfolding in zip(report["conv2"].spectra, (weight.flatten(1), weight.transpose(0, 1).flatten(1)), strict=True):
        values = torch.linalg.svdvals(unfolding)
        assert outline.full == len(values)
        torch.testing.assert_close(torch.tensor(outline.values).double(), (values / values[0])[list(places(outline.full))], rtol=1e-5, atol=1e-6)
    page = Page(report.to_html())
    assert "out: 8 of 24" in page.text
    assert "in: 4 of 16" in page.text
    assert "in: all of 3" in page.text  # conv1 is cut in one mode
    marks = [a for tag, a in page.elements if tag == "line" and "mark" in a["class"]]
    assert len(marks) == sum(rank is not None for row in report.layers for rank in row.ranks or ())


def test_spectra_are_saved_and_outlive_reconstruction_and_training(net, tmp_path):
    spectra = surgery.report(net)["conv2"].spectra
    surgery.save(net, tmp_path / "net")
    with torch.no_grad():
        net.conv2.core.weight.mul_(2)
    assert surgery.report(net)["conv2"].spectra == spectra
    assert surgery.report(surgery.reconstruct(net))["conv2"].spectra == spectra
    assert surgery.report(surgery.load(tmp_path / "net", Small()))["conv2"].spectra == spectra


def test_long_spectra_keep_their_ends_and_kinds_without_spectra_say_so():
    assert places(5) == (0, 1, 2, 3, 4)
    assert (len(places(1000)), places(1000)[0], places(1000)[-1]) == (48, 0, 999)
    model = nn.Sequential(nn.Conv2d(8, 100, 3), nn.Conv2d(100, 8, 3))
    report = surgery.report(surgery.decompose(model, {"0": surgery.CP(3), "1": surgery.Spatial(20)}))
    assert [len(row.spectra) for row in report.layers] == [0, 1]
    assert "Not recorded for 1 decomposed layer: 0" in Page(report.to_html()).text


@pytest.mark.parametrize(
    "damage",
    [{"full": -1}, {"full": 10**12}, {"values": [2.0] * 24}, {"values": ["x"] * 24}, {"values": 5}, {"mode": 5}, {"full": None}],
    ids=str,
)
def test_a_tampered_outline_is_damage(net, damage, tmp_path):
    from surgery.checkpoint import record_from_text, record_to_data
    from surgery.record import read_record

    data = json.loads(json.dumps(record_to_data(read_record(net))))
    assert record_from_text(json.dumps(data), tmp_path) == read_record(net)
    next(site for site in data["sites"] if site["name"] == "conv2")["spectra"][0] |= damage
    with pytest.raises(surgery.SurgeryValueError, match="its surgery record is damaged"):
        record_from_text(json.dumps(data), tmp_path)


def test_what_a_rule_looked_at_and_kept_is_shown():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    report = surgery.report(surgery.decompose(model, "energy:0.999999"))
    assert report["0"].status == "kept"
    assert "out: kept, full rank 8" in Page(report.to_html()).text


def test_the_outcome_of_a_latency_budget_is_a_card(net):
    told = {"runtime": "onnxruntime 1.0", "asked": 0.7, "predicted": 0.69, "replans": 0, "batch": 1, "threads": 2}
    outcome = LatencyOutcome(measured=0.68, low=0.66, high=0.71, **told)
    page = Page(replace(surgery.report(net), latency=outcome).to_html())
    assert "0.68 measured in onnxruntime 1.0 (0.66 to 0.71)" in page.text
    assert (
        "measured in"
        not in Page(replace(surgery.report(net), latency=LatencyOutcome(measured=None, low=None, high=None, **told)).to_html()).text.partition(
            "Passes"
        )[0]
    )


def test_a_trade_off_without_a_place_on_it(small, net):
    report = surgery.report(net, example_inputs=X, before=small)
    assert report.place is not None
    lost = replace(report, layers=tuple(replace(row, error=None) for row in report.layers))
    assert lost.place is None
    page = Page(lost.to_html())
    assert "Error against MACs" in page.text
    assert "this network" not in page.text
    assert "this network" in Page(report.to_html()).text


def test_the_graph_of_a_network_without_chains(small):
    page = Page(surgery.report(small, example_inputs=X).to_html())
    assert sum(tag == "rect" for tag, _ in page.elements) == len(surgery.report(small, example_inputs=X).flow.nodes)
