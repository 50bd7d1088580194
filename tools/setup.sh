# Sourced by tools/quickstart and tools/test: a virtual environment with the project and the extras in $EXTRAS, kept up to date.
# Uses .venv in the project, or the folder in SURGERY_VENV. Nothing is installed again until a file that says what to install changes.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
VENV=${SURGERY_VENV:-.venv}

fail() { echo "error: $*" >&2; exit 1; }

command -v "$PYTHON" >/dev/null || fail "no $PYTHON on the PATH; set PYTHON to a Python 3.11 or later"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$("$PYTHON" --version) is too old; set PYTHON to a Python 3.11 or later"

if [ ! -x "$VENV/bin/pip" ]; then # also one that was begun and has no pip yet
    "$PYTHON" -m venv "$VENV" || fail "could not make a virtual environment; on Debian and Ubuntu install python3-venv"
fi

wanted="$EXTRAS $(cat pyproject.toml constraints.txt surgery/version.py | cksum)"
stamp="$VENV/surgery-installed-$EXTRAS"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing into $VENV (once) ..." >&2
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$EXTRAS]"
    echo "$wanted" >"$stamp"
fi
PATH="$(cd "$VENV/bin" && pwd):$PATH"
export PATH
