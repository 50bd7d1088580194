"""``--html``: the report as one page, with what the command knows beside the network."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import surgery

if TYPE_CHECKING:
    from torch import nn

__all__ = ["add_page_arguments", "save_page"]


def add_page_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--html", metavar="FILE", type=Path, help="also write the report as one self-contained page")


def save_page(path: Path, model: nn.Module, inputs: Any, before: nn.Module | None, title: str) -> None:
    """The page with the graph, and with the trade-off where the original network is known; what cannot be had is said on stderr."""
    try:
        report = surgery.report(model, example_inputs=inputs, before=before)
    except surgery.SurgeryError as error:
        print(f"{path}: without graph and trade-off: {error}", file=sys.stderr)
        report = surgery.report(model)
    if before is None:
        print(f"{path}: without trade-off, which needs the weights from before the cut: give --before MODEL", file=sys.stderr)
    report.save_html(path, title)
