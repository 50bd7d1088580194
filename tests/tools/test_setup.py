"""``tools/setup.sh``: an environment that was begun and not finished is finished."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from tests.conftest import ROOT

PYTHON = """#!/bin/sh
# Stands for a Python: as a module "venv" it makes the folder, without pip unless it is told that there is one; as "pip" it notes what is asked of it.
case "$1 $2" in
"-m venv")
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
    [ -n "$HAS_PIP" ] || exit 1
    cp "$0" "$3/bin/pip" ;;
"-m pip")
    [ -x "$(dirname "$0")/pip" ] || exit 1
    echo "$@" >>"$LOG" ;;
esac
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_an_environment_without_pip_is_made_again(tmp_path):
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(PYTHON)
    python.chmod(0o755)
    known = os.environ | {"PYTHON": str(python), "SURGERY_VENV": str(tmp_path / "venv"), "EXTRAS": "export", "LOG": str(log)}

    def set_up(**more):
        return subprocess.run(["bash", "-c", "source tools/setup.sh"], cwd=ROOT, env=known | more, capture_output=True, text=True, check=False)

    failed = set_up()
    assert failed.returncode == 1
    assert "python3-venv" in failed.stderr
    assert (tmp_path / "venv" / "bin" / "python").exists()
    assert set_up(HAS_PIP="yes").returncode == 0
    assert set_up().returncode == 0  # nothing is to be done
    (asked,) = log.read_text().splitlines()
    assert asked.endswith("--editable .[export]")
