"""The house rules: imports go one way, importing is cheap, the documents are true."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SOURCES = sorted([*ROOT.glob("passes/**/*.py"), *ROOT.glob("surgery/**/*.py")])


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    names = imported(path)
    package = path.relative_to(ROOT).parts[0]
    assert not names & ({"surgery", "benchmarks", "tools", "tests"} if package == "passes" else {"benchmarks", "tools", "tests"})
    if path.parent.name != "zoo":
        assert not names & {"torchvision", "timm"}


def test_what_one_module_takes_from_another_is_among_what_that_one_offers():
    offered = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): names_offered(path) for path in SOURCES}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and offered.get(node.module or "") is not None:
                taken = {alias.name for alias in node.names if f"{node.module}.{alias.name}" not in offered}
                assert taken <= offered[node.module], f"{path} takes more from {node.module} than its __all__ names"


def names_offered(path: Path) -> set[str] | None:
    """Its ``__all__``, or None where it has none, or computes it."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__" and isinstance(node.value, ast.List):
            return {element.value for element in node.value.elts if isinstance(element, ast.Constant)}
    return None


def fresh_python(code: str, **environment: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ | environment).stdout


def test_importing_loads_nothing_heavy_beyond_torch():
    code = "import torch, sys; before = set(sys.modules); import surgery; print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    loaded = set(fresh_python(code).split())
    assert not loaded & {"networkx", "tensorly", "onnx", "onnxruntime", "onnxscript", "scipy", "rich", "safetensors", "torchvision", "timm"}
    assert {"surgery", "passes"} <= loaded


def test_importing_prints_nothing_and_changes_no_state():
    code = "import torch; s = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads(); import surgery; "
    code += "assert torch.equal(s[0], torch.get_rng_state()) and s[1:] == (torch.get_default_dtype(), torch.get_num_threads())"
    assert fresh_python(code) == ""


def test_importing_adds_at_most_a_tenth_to_importing_torch(tmp_path):
    """With both compiled, as they are from the second import on, also where the environment forbids Python to keep what it compiled."""
    code = "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); import surgery; print((time.perf_counter() - b) / (b - a))"
    kept = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    assert min(float(fresh_python(code, **kept)) for _ in range(5)) <= 0.10


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_surgery_needs_one_copy_of_the_model_and_eight_of_its_largest_layer():
    command = [sys.executable, "benchmarks/surgery_speed.py", "--peak", "depth8"]
    one_arena = os.environ | {"MALLOC_ARENA_MAX": "1"}  # what glibc keeps in several varies from run to run by as much as is measured
    found = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=one_arena).stdout)
    assert found["cut"] == 8
    assert 0.2 * found["model_mb"] < found["extra_mb"] <= found["bound_mb"]  # the chains alone take that much: what is measured is real


def test_commands_that_the_readme_names_exist():
    for command in re.findall(r"^(?:tools|\.ci)/\S+", (ROOT / "README.md").read_text(), re.MULTILINE):
        assert (ROOT / command).exists(), command
