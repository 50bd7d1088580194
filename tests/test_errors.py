"""Every row of docs/errors.md is run as it stands: the error that it says, and nothing has changed."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch

import surgery
from surgery.cli import main
from tests.conftest import ROOT
from tests.networks import Small
from tests.wrong_uses import scope

PAGE = ROOT / "docs" / "errors.md"


def rows() -> list[tuple[str, str, str, str]]:
    """Preparation, wrong use, error and message of each row."""
    found = []
    for line in PAGE.read_text().splitlines():
        if line.startswith("| `"):
            done, error, message = line.removeprefix("| ").removesuffix(" |").split(" | ")
            *before, code = re.findall("`(.*?)`", done)
            found.append((*(before or [""]), code, error.strip("`"), message.removeprefix("`").removesuffix("`")))
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wrong") / "made"
    folder.mkdir()
    torch.manual_seed(0)
    model = Small().eval()
    (folder / "notes.txt").write_text("notes\n")
    surgery.plan(model, 0.5).save(folder / "plan.json")
    surgery.export_onnx(model, folder / "net.onnx", torch.zeros(2, 3, 12, 12), exporter="torchscript")
    surgery.save(surgery.decompose(model, 0.5), folder / "net")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def state(names) -> list[object]:
    """Everything that must stay: the models to the bit, their classes and modes, the optimizer with its state, the number of threads."""
    found: list[object] = [torch.get_num_threads()]
    for name in ("model", "other"):
        model = names[name]
        found += [(key, id(value), value.tolist()) for key, value in model.state_dict(keep_vars=True).items()]
        found += [(key, type(module), module.training, len(module._forward_hooks)) for key, module in model.named_modules()]
        found.append(sorted(vars(model)))
    sgd = names["sgd"]
    found += [{key: [id(p) for p in value] if key == "params" else value for key, value in group.items()} for group in sgd.param_groups]
    return [*found, [(id(parameter), parameter_state["momentum_buffer"].tolist()) for parameter, parameter_state in sgd.state.items()]]


def command(code: str) -> tuple[str, str]:
    """Exit code and the last line on stderr of a command; nothing may be on stdout, nor anything that looks like a traceback."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            ended = main(shlex.split(code)[1:])
        except SystemExit as left:
            ended = left.code
    assert out.getvalue() == ""
    assert "Traceback" not in err.getvalue()
    return f"exit {ended}", re.sub(r"^(surgery( \w+)?: )?error: ", "", err.getvalue().splitlines()[-1])


def raised(code: str, names) -> tuple[str, str]:
    try:
        exec(code, names)
    except (surgery.SurgeryError, OSError) as error:
        return type(error).__name__, str(error)
    return "nothing", ""


@pytest.mark.parametrize(("before", "code", "error", "message"), rows(), ids=[f"{row[1]}{' after ' if row[0] else ''}{row[0]}" for row in rows()])
def test_a_wrong_use_gets_its_error_and_changes_nothing(before, code, error, message, made, tmp_path, monkeypatch):
    folder = tmp_path / "work"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    names = {**scope(), "hide": lambda package: monkeypatch.setitem(sys.modules, package, None)}
    exec(before, names)
    was = files(folder), state(names)
    got, told = command(code) if code.split()[0] == "surgery" else raised(code, names)
    said = told.replace(f"{folder}/", "")
    if got != error or not re.fullmatch(re.escape(message).replace("…", ".*"), said, re.DOTALL):
        pytest.fail(f"the page says `{error}` | `{message}`, but it is\n`{got}` | `{said}`", pytrace=False)
    assert (files(folder), state(names)) == was


def test_the_page_has_what_it_claims():
    assert len(rows()) >= 200
    assert len(set(rows())) == len(rows())
    kinds = {"ParityError", "OSError", "FileNotFoundError", "IsADirectoryError", "exit 1", "exit 2"}
    assert {row[2] for row in rows()} <= {name for name in dir(surgery) if name.endswith("Error") or name == "MissingExtra"} | kinds


FIXED = {
    "decompose": "model ranks example_inputs method include exclude guard round_to calibration refine optimizer device inplace progress",
    "reconstruct": "model foreign example_inputs optimizer inplace",
    "load": "path fresh_model",
    "save": "model path",
    "export_onnx": "model path example_inputs check dynamic_batch opset",
    "benchmark": "before after example_inputs runtimes",
    "DecompositionSchedule": "decompose_at reconstruct_at ranks",
    "trace": "model example_inputs",
    "capture": "model example_inputs",
}
BASES = {"SurgeryValueError": ValueError, "SurgeryTypeError": TypeError, "ParityError": RuntimeError, "MissingExtra": ImportError}


def test_what_others_have_written_down_stays():
    for name, parameters in FIXED.items():
        assert set(parameters.split()) <= set(inspect.signature(getattr(surgery, name)).parameters), name
    for name, base in BASES.items():
        assert {base, surgery.SurgeryError} <= set(getattr(surgery, name).__mro__), name
