"""The command line: tables for people, JSON for machines, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy
import pytest
import torch

import surgery
from passes.geometry import Geometry
from surgery.cli import main, parse_ranks_text
from surgery.cost.profile import Profile, TimedShape, write_shapes
from tests.conftest import ROOT

MODEL = "surgery:resnet20"


def out(capsys, *arguments):
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_summary(capsys):
    text = out(capsys, "summary", MODEL)
    assert "layer3.0.conv1  Conv2d 32->64 3x3/2" in text
    data = json.loads(out(capsys, "summary", MODEL, "--json"))
    assert data["macs_before"] == 40_551_040  # 9 * (3*16*1024 + 6*16*16*1024 + 2*(16*32*256 + 5*32*32*256)) + 640, counted by hand
    assert data["params_before"] == 269_722


def test_plan_decompose_report_reconstruct(capsys, tmp_path):
    text = out(capsys, "plan", MODEL, "--ranks", "evbmf", "--out", str(tmp_path / "plan.json"))
    assert "linear layers are cut only where they are named" in text
    plan = surgery.Plan.load(tmp_path / "plan.json")
    assert json.loads(out(capsys, "plan", MODEL, "--json")) == json.loads(plan.to_json())
    done = json.loads(out(capsys, "decompose", MODEL, "--ranks", str(tmp_path / "plan.json"), "--out", str(tmp_path / "net"), "--json"))
    assert {row["name"]: row["status"] for row in done["layers"]}["layer3.2.conv2"] == "decomposed"
    assert json.loads(out(capsys, "report", str(tmp_path / "net"), "--json"))["layers"] == done["layers"]
    assert "passes: Decompose, Reconstruct" in out(capsys, "reconstruct", str(tmp_path / "net"), "--out", str(tmp_path / "back"))
    assert "reconstructed" in out(capsys, "report", str(tmp_path / "back"))


def test_rank_options(capsys):
    options = ("--ranks", "0.3", "--round-to", "8", "--include", "re:layer3.*", "--exclude", "layer3.0.conv1", "--guard", "none", "--json")
    sites = json.loads(out(capsys, "plan", MODEL, *options))["sites"]
    assert sites["layer3.0.conv2"] == {"kind": "tucker", "rank_out": 24, "rank_in": 24}
    assert sites["layer3.0.conv1"] == {"kind": "keep", "reason": "excluded"}
    assert sites["layer1.0.conv1"] == {"kind": "keep", "reason": "not included"}
    named = json.loads(out(capsys, "plan", MODEL, "--ranks", '{"layer3.0.conv1": [8, 4], "linear": 3}', "--json"))["sites"]
    assert named["linear"] == {"kind": "svd", "rank": 3}


def test_export_and_bench(capsys, tmp_path):
    assert "torchscript" in out(capsys, "export", MODEL, str(tmp_path / "net.pt"))
    data = json.loads(out(capsys, "export", MODEL, str(tmp_path / "net.onnx"), "--json", "--dynamic-batch"))
    assert data["difference"] < 1e-4
    assert data["inputs"] == ["x: batch x 3 x 32 x 32"]
    options = ("--dynamic-size", "--exporter", "torchscript", "--opset", "17", "--json")
    data = json.loads(out(capsys, "export", MODEL, str(tmp_path / "size.onnx"), *options))
    assert (data["inputs"], data["opset"], data["exporter"]) == (["x: 1 x 3 x height x width"], 17, "torchscript")
    assert "program" in out(capsys, "export", MODEL, str(tmp_path / "net.pt2"))
    measured = json.loads(out(capsys, "bench", MODEL, "--ranks", "0.25", "--runtimes", "eager", "--repeats", "8", "--json"))
    assert measured["flops_ratio"] > 2


@pytest.mark.parametrize(
    ("options", "convolutions", "norms"), [((), 3, 1), (("--deploy",), 3, 0), (("--fuse",), 1, 0), (("--fuse", "--deploy"), 1, 0)]
)
def test_export_of_a_network_that_was_made_ready(capsys, tmp_path, options, convolutions, norms):
    path = str(tmp_path / "net.pt")
    out(capsys, "export", "tests.networks:ByHand", path, "--input-shape", "2,3,8,8", *options)
    nodes = [node.kind() for node in torch.jit.load(path).inlined_graph.nodes()]
    assert sum("convolution" in kind for kind in nodes) == convolutions
    assert nodes.count("aten::batch_norm") == norms


def keep_all(site, spectra):
    return surgery.Keep(f"{len(spectra)} spectra seen")


def test_a_rule_of_your_own(capsys):
    assert out(capsys, "plan", MODEL, "--ranks", f"{__name__}:keep_all").count("2 spectra seen") == 19


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["summary", "surgery:resnet21"], "did you mean 'resnet20'"),
        (["summary", "no_such_module:build"], "no module 'no_such_module'"),
        (["summary", "json:nothing"], "no callable of that name"),
        (["summary", "builtins:dict"], "must give an nn.Module, got dict"),
        (["plan", MODEL, "--ranks", "absent.json"], "absent.json"),
        (["plan", MODEL, "--out", "nowhere/plan.json"], "nowhere"),
        (["summary", MODEL, "--input-shape", "1,4,32,32"], "example_inputs: CifarResNet fails"),
        (["summary", MODEL, "--weights", "absent.pt"], "absent.pt"),
        (["plan", MODEL, "--calibration", "absent.npy"], "absent.npy"),
        (["plan", MODEL, "--calibration", "."], "there is no .npy or .npz file in this folder"),
        (["plan", MODEL, "--calibration", __file__], "test_cli.py: no batch that numpy.save or numpy.savez wrote"),
        (["export", "tests.networks:Random", "net.pt", "--input-shape", "1,3,8,8"], "the network itself differs"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_1(capsys, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "arguments are required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["plan"], "arguments are required: MODEL"),
        (["summary", "resnet20"], "argument MODEL: 'resnet20': expected torchvision:NAME"),
        (["summary", MODEL, "--input-shape", "a"], "expected positive numbers"),
        (["plan", MODEL, "--ranks", "{"], "not a JSON object"),
        (["plan", MODEL, "--ranks", "4"], "ambiguous"),
        (["plan", MODEL, "--ranks", "evmbf"], "no rule and no file"),
        (["plan", MODEL, "--ranks", '{"linear": {"kind": "svd", "ranks": 4}}'], "ranks: 'linear': 'svd' needs exactly the fields ['rank']"),
        (["plan", MODEL, "--ranks", "no_such_module:rule"], "no module 'no_such_module'"),
        (["export", MODEL, "net.tflite"], "the ending names the format"),
        (["export", MODEL, "net.pt", "--opset", "20"], "--opset is for onnx"),
        (["export", MODEL, "net.pt2", "--exporter", "dynamo"], "--exporter is for onnx and openvino"),
        (["bench", MODEL, "--runtimes", "eager,tensorrt"], "'tensorrt' is none of"),
        (["bench", MODEL, "--size", "batch=2"], "--size: it is for two ONNX files"),
        (["bench", MODEL, "--threads", "0"], "threads: expected a number of at least 1"),
        (["report", MODEL, "--time", "eager"], "--time: it is for the page; give --html FILE"),
        (["decompose", MODEL, "--time", "tensorrt"], "'tensorrt' is none of"),
        (["decompose", MODEL, "--html", "page.html", "--time", "cuda"], "argument --time: 'cuda' is none of"),
        (["bench", "a.onnx", "b.onnx", "--calibration", "seen.npy"], "--calibration: nothing is cut"),
        (["bench", "a.onnx", "b.onnx", "--ranks", "0.5", "--round-to", "8"], "--ranks, --round-to: nothing is cut"),
        (["bench", "a.onnx", "b.onnx", "--include", "conv", "--weights", "w.pt"], "--include, --weights: nothing is cut"),
        (["summary", "a" * 300], "expected torchvision:NAME"),
        (["plan", MODEL, "--ranks", "a" * 300], "no rule and no file"),
        (["profile", "shapes.json", "--out", "times.json", "--device", "nowhere"], "'nowhere' is no device that this torch can compute on"),
    ],
)
def test_wrong_usage_is_exit_code_2(capsys, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert "usage" in shown
    assert message in shown


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--method", "tuker", "did you mean 'tucker'"),
        ("--guard", "money", "'money' is none of"),
        ("--round-to", "0", "must be at least 1"),
        ("--round-to", "x", "invalid int value: 'x'"),
    ],
)
def test_wrong_options_are_wrong_usage(capsys, option, value, message):
    with pytest.raises(SystemExit) as caught:
        main(["plan", MODEL, option, value])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_ranks_written_as_plans_write_them(capsys):
    text = '{"layer3.0.conv1": {"kind": "spatial", "rank": 4}, "layer3.0.conv2": {"kind": "keep", "reason": "mine"}}'
    sites = json.loads(out(capsys, "plan", MODEL, "--ranks", text, "--json"))["sites"]
    assert sites["layer3.0.conv1"] == {"kind": "spatial", "rank": 4}
    assert sites["layer3.0.conv2"] == {"kind": "keep", "reason": "mine"}


def test_ranks_as_text():
    assert parse_ranks_text("0.5") == 0.5
    assert parse_ranks_text("1.0") == 1.0
    assert isinstance(parse_ranks_text("1.0"), float)
    assert parse_ranks_text("energy:0.9") == "energy:0.9"
    assert parse_ranks_text('{"a": [1, null]}') == {"a": [1, None]}


def run(*command):
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)


def test_as_programs(tmp_path):
    assert run("-m", "surgery", "--version").stdout.strip() == f"surgery {surgery.__version__}"
    done = run("tools/export_onnx.py", MODEL, str(tmp_path / "net.onnx"), "--ranks", "evbmf")
    assert (done.returncode, done.stderr) == (0, "")
    assert "on 3x3x32x32 and 1x3x32x32" in done.stdout
    failed = run("tools/export_onnx.py", MODEL, str(tmp_path / "other.onnx"), "--input-shape", "1,1,8,8")
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: example_inputs")
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


def test_wrong_usage_of_the_exporting_script(tmp_path):
    wrong = run("tools/export_onnx.py", MODEL, str(tmp_path / "net.pt"))
    assert wrong.returncode == 2
    assert wrong.stderr.endswith("the name must end in .onnx\n")
    nowhere = run("tools/export_onnx.py", MODEL, str(tmp_path / "none" / "net.onnx"))
    assert nowhere.returncode == 1
    assert nowhere.stderr.startswith("error: OUT")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")])
def test_too_little_memory_is_one_line(capsys, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr("surgery.zoo.make", full)
    assert main(["summary", MODEL]) == 1
    assert capsys.readouterr().err.startswith("error: not enough memory: ")
    with pytest.raises(SystemExit) as left:
        main(["summary", MODEL, "--input-shape", "1,3,99999999999999999999,1"])
    assert left.value.code == 2


def test_a_saved_folder_of_ones_own_architecture(capsys, tmp_path):
    from tests.networks import Small

    surgery.save(surgery.decompose(Small(), 0.5), tmp_path / "net")
    assert main(["report", str(tmp_path / "net")]) == 1
    assert "--architecture package.module:factory" in capsys.readouterr().err
    assert "4 of 6 layers" in out(capsys, "report", str(tmp_path / "net"), "--architecture", "tests.networks:Small")
    assert main(["report", MODEL, "--architecture", "tests.networks:Small"]) == 1
    assert "architecture: is for a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def make(:", "importing broken failed: SyntaxError"),
        ("import nothing_of_that_name", "importing broken failed: ModuleNotFoundError"),
        ("raise RuntimeError('no licence')", "importing broken failed: RuntimeError: no licence"),
        ("import sys; sys.exit(3)", "importing broken failed: SystemExit: 3"),
        ("def make(): raise SystemExit(3)", "the factory failed without arguments: SystemExit: 3"),
    ],
)
def test_factories_that_fail_give_one_line(capsys, tmp_path, monkeypatch, source, message):
    (tmp_path / "broken.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    assert main(["summary", "broken:make"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: broken:make: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1 or "SyntaxError" in message


def test_other_wrong_uses_give_one_line(capsys, tmp_path):
    (tmp_path / "empty.pt").write_bytes(b"")
    for arguments, message in ((["summary", MODEL, "--weights", str(tmp_path / "empty.pt")], "torch.load cannot read it as plain weights"),):
        assert main(arguments) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["plan", MODEL, "--ranks", '{"linear": 2, "linear": 3}'])
    assert "appears twice" in capsys.readouterr().err


def test_a_reader_that_has_read_enough():
    command = f"{sys.executable} -m surgery summary {MODEL} | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0"
    assert done.stderr == ""


def test_a_model_that_is_itself_a_layer(capsys, tmp_path, monkeypatch):
    (tmp_path / "bare.py").write_text("import torch\ndef make(): return torch.nn.Conv2d(8, 8, 3)")
    monkeypatch.syspath_prepend(tmp_path)
    assert "1 of 1 layers decomposed" in out(capsys, "decompose", "bare:make", "--ranks", "0.5", "--input-shape", "1,8,9,9")


def test_onnx_files_in_and_out(capsys, tmp_path):
    model, cut, back = (str(tmp_path / f"{name}.onnx") for name in ("model", "cut", "back"))
    out(capsys, "export", MODEL, model, "--exporter", "torchscript", "--dynamic-batch")
    assert "layer3.0.conv1  Conv2d 32->64 3x3/2" in out(capsys, "summary", model)
    done = json.loads(out(capsys, "decompose", model, cut, "--ranks", "budget:macs=0.6", "--input-shape", "2,3,32,32", "--json"))
    assert done["macs_before"] == 2 * 40_551_040
    assert 0 < done["macs_after"] <= 0.6 * done["macs_before"]
    assert done["file"]["rounding"] < 1e-4
    assert json.loads(out(capsys, "report", cut, "--json"))["layers"] == done["layers"]
    assert "back.onnx: 1.1" in out(capsys, "reconstruct", cut, back)
    named = json.loads(out(capsys, "plan", model, "--ranks", '{"layer1.0.conv1": [4, 4]}', "--out", str(tmp_path / "plan.json"), "--json"))["sites"]
    assert named["layer1.0.conv1"] == {"kind": "tucker", "rank_out": 4, "rank_in": 4}
    assert main(["reconstruct", model, back]) == 1
    assert "no chain that surgery made" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["one file", "named", "folder"])
def test_calibration_from_files(capsys, tmp_path, form):
    onnx = pytest.importorskip("onnx")
    batches = [torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).numpy() for seed in (1, 2)]
    if form == "named":
        numpy.savez(tmp_path / "seen.npz", x=batches[0])
    numpy.save(tmp_path / "seen.npy", batches[0])
    (tmp_path / "folder").mkdir()
    for number, batch in enumerate(batches):
        numpy.save(tmp_path / "folder" / f"{number}.npy", batch)
    (tmp_path / "folder" / "README").write_text("not a batch")
    path = tmp_path / {"one file": "seen.npy", "named": "seen.npz", "folder": "folder"}[form]
    found = json.loads(out(capsys, "decompose", MODEL, "--ranks", "budget:macs=0.5", "--calibration", str(path), "--json"))
    assert found["calibrated"] == (4 if form == "folder" else 2)
    assert all(row["output_error"] is not None for row in found["layers"] if row["status"] == "decomposed")
    model, cut = str(tmp_path / "model.onnx"), str(tmp_path / "cut.onnx")
    out(capsys, "export", MODEL, model, "--exporter", "torchscript", "--dynamic-batch")
    if form == "named":
        numpy.savez(path, **{onnx.load(model).graph.input[0].name: batches[0]})
    done = json.loads(out(capsys, "decompose", model, cut, "--ranks", "budget:macs=0.5", "--calibration", str(path), "--json"))
    assert done["calibrated"] == found["calibrated"]


def damaged(path):
    numpy.savez(path, x=numpy.zeros((2, 3, 32, 32), numpy.float32))
    path.write_bytes(path.read_bytes()[:-30])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: torch.save(torch.zeros(2, 3, 32, 32), path), "something that is no array in it"),
        (damaged, "no batch that numpy.save or numpy.savez wrote"),
        (lambda path: path.write_bytes(b"\x93NUMPY\x01\x00\x08\x00{'descr'"), "no batch that numpy.save or numpy.savez wrote"),
        (lambda path: numpy.savez(path, x=numpy.zeros((1, 3, 32, 32), numpy.complex64)), "an array of complex64 in it"),
        (lambda path: numpy.savez(path, x=numpy.array(["image"])), "an array of <U5 in it"),
    ],
    ids=["torch", "truncated", "header", "complex", "strings"],
)
def test_files_that_hold_no_batch(capsys, tmp_path, write, message):
    path = tmp_path / "seen.npz"
    write(path)
    assert main(["plan", MODEL, "--calibration", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: --calibration: {path}: {message}")
    assert error.count("\n") == 1


def test_double_precision_and_foreign_byte_order_are_read(capsys, tmp_path):
    batch = numpy.random.default_rng(0).normal(size=(1, 3, 32, 32))
    found = []
    for array in (batch.astype(numpy.float32), batch, batch.astype(">f4")):
        numpy.save(tmp_path / "seen.npy", array)
        found.append(out(capsys, "plan", MODEL, "--ranks", "budget:macs=0.5", "--calibration", str(tmp_path / "seen.npy"), "--json"))
    assert len(set(found)) == 1


def test_a_batch_that_does_not_fit_an_onnx_file_is_named(capsys, tmp_path):
    pytest.importorskip("onnxruntime")
    model = str(tmp_path / "model.onnx")
    out(capsys, "export", MODEL, model, "--exporter", "torchscript", "--dynamic-batch")
    numpy.savez(tmp_path / "seen.npz", numpy.zeros((2, 3, 32, 32), numpy.float32))
    assert main(["decompose", model, str(tmp_path / "cut.onnx"), "--calibration", str(tmp_path / "seen.npz")]) == 1
    assert "calibration: batch 0: the inputs of the file are x; got arr_0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decompose", "a.onnx"], "name the ONNX file to write"),
        (["bench", "a.onnx"], "name the ONNX file to time it against after it"),
        (["decompose", MODEL, "b.onnx"], "OUT is for MODELs that are ONNX files"),
        (["decompose", "a.onnx", "b.onnx", "--effective-weights"], "--effective-weights is not for ONNX files"),
        (["reconstruct", MODEL], "--out FOLDER is required"),
        (["report", "a.onnx", "--html", "a.html", "--time", "onnxruntime"], "--time is not for ONNX files"),
    ],
)
def test_wrong_usage_with_onnx_files(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_page_of_an_onnx_file_and_one_with_the_network_before(capsys, tmp_path):
    model, cut, page = (str(tmp_path / name) for name in ("model.onnx", "cut.onnx", "page.html"))
    out(capsys, "export", MODEL, model, "--exporter", "torchscript", "--dynamic-batch")
    out(capsys, "decompose", model, cut, "--ranks", '{"layer3.0.conv1": [8, 4]}', "--html", page)
    assert "tucker 8, 4" in (tmp_path / "page.html").read_text()
    out(capsys, "decompose", MODEL, "--ranks", '{"layer3.0.conv1": [8, 4]}', "--out", str(tmp_path / "net"))
    out(capsys, "report", str(tmp_path / "net"), "--architecture", MODEL, "--before", MODEL, "--html", page)
    assert "Error against MACs" in (tmp_path / "page.html").read_text()
    untrained = "surgery.zoo.resnet_cifar:resnet20"
    assert main(["report", str(tmp_path / "net"), "--architecture", MODEL, "--before", untrained, "--html", page]) == 0
    assert f"--before {untrained}: its weights are not those that this network was cut from" in capsys.readouterr().err


def test_a_summary_of_a_file_whose_sizes_are_open_has_no_calls(capsys, tmp_path):
    file = tmp_path / "open.onnx"
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)).eval()
    surgery.export_onnx(model, file, torch.randn(1, 3, 9, 9), exporter="torchscript", dynamic_size=True)
    assert "None" not in out(capsys, "summary", str(file))


def test_a_profile_on_one_thread(capsys, tmp_path):
    shape = TimedShape((Geometry(in_channels=4, out_channels=4),), (2, 4), "float32", False)
    write_shapes([shape], tmp_path / "shapes.json")
    told = out(capsys, "profile", str(tmp_path / "shapes.json"), "--out", str(tmp_path / "times.json"), "--runtime", "eager", "--threads", "1")
    assert "1 times in eager" in told
    assert list(Profile.load(tmp_path / "times.json").entries) == [shape.key]


def test_nothing_is_written_by_a_command_that_fails(capsys, tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text("mine")
    for more in (["--explain", "nolayer"], ["--diff", str(tmp_path / "missing.json")]):
        assert main(["plan", MODEL, "--ranks", "0.5", "--out", str(plan), *more]) == 1
        assert plan.read_text() == "mine"
    assert main(["decompose", MODEL, "--ranks", "0.5", "--out", str(tmp_path / "cut"), "--html", str(tmp_path / "nowhere" / "page.html")]) == 1
    assert not (tmp_path / "cut").exists()
    assert "does not exist; make it first" in capsys.readouterr().err
    net = tmp_path / "net.onnx"
    torch.manual_seed(0)
    surgery.export_onnx(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)).eval(), net, torch.randn(1, 3, 8, 8), exporter="torchscript")
    before = net.read_bytes()
    assert main(["decompose", str(net), str(net), "--ranks", "0.5", "--html", str(tmp_path / "nowhere" / "page.html")]) == 1
    assert net.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decompose", "absent:net", "--out", "nowhere/net"], "--out: the folder"),
        (["decompose", "absent:net", "--out", "mine"], "mine: exists and is not a folder written by surgery.save"),
        (["reconstruct", "absent:net", "--out", "mine/notes.txt"], "mine/notes.txt: exists and is not a folder"),
        (["plan", "absent:net", "--out", "nowhere/plan.json"], "--out: the folder nowhere does not exist"),
        (["plan", "absent:net", "--picture", "mine"], "--picture: mine is a folder"),
        (["plan", "absent.onnx", "--out", "nowhere/plan.json"], "--out: the folder nowhere does not exist"),
        (["report", "absent.onnx", "--html", "nowhere/page.html"], "--html: the folder nowhere does not exist"),
        (["profile", "absent.json", "--out", "nowhere/times.json"], "--out: the folder nowhere does not exist"),
        (["plan", "absent.onnx", "--out", "/dev/null"], "absent.onnx"),
    ],
)
def test_where_nothing_can_be_written_no_work_is_begun(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


def test_without_a_stdout_and_names_that_no_encoding_knows(tmp_path):
    code = "import sys; from surgery.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "summary", MODEL]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    odd = str(tmp_path / "net-\udcff")
    done = subprocess.run([sys.executable, "-c", code, "decompose", MODEL, "--ranks", "0.5", "--out", odd, "--json"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr
