"""The command line: a file a command or a pair that belongs together. Results go to stdout, progress and errors to stderr.

Exit codes: 0 done, 1 could not, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

import surgery
from passes.running import first_line, is_out_of_memory, shorten
from surgery.cli import bench, decompose, export, plan, profile, summary
from surgery.cli.arguments import add_model_arguments, open_model, parse_ranks_text
from surgery.cli.export import export_to
from surgery.cli.targets import check_file

__all__ = ["add_model_arguments", "check_file", "export_to", "guarded", "main", "open_model", "parse_ranks_text"]

COMMANDS = (summary, plan, decompose, export, bench, profile)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)

    def run() -> None:
        with surgery.show_progress():
            options.run(options)

    return guarded(run)


def guarded(action: Callable[[], None]) -> int:
    """Run an action; an error that users can act on becomes one line on stderr and exit code 1."""
    _make_writable()
    try:
        action()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (surgery.SurgeryError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: not enough memory: {shorten(first_line(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
    return 0


def _make_writable() -> None:
    """Where a process has no stdout or stderr what is written there is lost; what their encoding does not know is written in escapes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - as long as the process
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="surgery", description="Decompose convolutional networks, fuse them back, export and measure.")
    parser.add_argument("--version", action="version", version=f"surgery {surgery.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in COMMANDS:
        module.add(commands)
    return parser
