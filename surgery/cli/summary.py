"""``surgery summary`` and ``surgery report``: the layers of a model, and what was done to them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import surgery
from surgery.cli.arguments import Commands, add_command, is_onnx_file, open_model, show, show_report
from surgery.cli.onnx_files import report_file
from surgery.cli.pages import add_page_arguments, check_page_arguments, save_page

if TYPE_CHECKING:
    from torch import nn


def add(commands: Commands) -> None:
    text = "List the layers of a model: parameters, MACs, and whether anything was done to them."
    add_command(commands, "summary", _summary, text, files=True)
    report = add_command(commands, "report", _report, "Show what was done to a saved network or an ONNX file.", files=True)
    add_page_arguments(report)
    report.add_argument(
        "--before", metavar="MODEL", help="the network that it was made from, for the page (default: what the folder names, if it is that)"
    )


def _summary(options: argparse.Namespace) -> None:
    if is_onnx_file(options.model):
        report_file(options, summary=True)
        return
    model, inputs = open_model(options)
    found = surgery.report(surgery.decompose(model, {}, example_inputs=inputs))
    from surgery.tables import summary_table

    show(options, lambda: summary_table(found), found.to_json)


def _report(options: argparse.Namespace) -> None:
    if is_onnx_file(options.model):
        report_file(options, summary=False)
        return
    check_page_arguments(options)
    model, inputs = open_model(options)
    times = None if options.html is None else save_page(options, model, inputs, _before(options, model))
    show_report(options, model, times)


def _before(options: argparse.Namespace, model: nn.Module) -> nn.Module | None:
    """The network that MODEL was made from: the one that is named, or the one that its folder names if the numbers say so too."""
    from surgery.original import is_original
    from surgery.record import read_record
    from surgery.zoo import is_registered, make

    found, record = surgery.report(model), read_record(model)
    if options.before is not None:
        named = make(options.before, options.architecture if Path(options.before).is_dir() else None)[0]
        if not is_original(named, model, found):
            told = "its weights are not those that this network was cut from, or it was trained since; the trade-off is theirs"
            print(f"--before {options.before}: {told}", file=sys.stderr)
        return named
    if all(row.status == "kept" for row in found.layers):
        return surgery.reconstruct(model)
    recorded = record.architecture if record is not None else None
    name = options.architecture or (recorded if is_registered(recorded) else None)
    before = None if name is None else make(name)[0]
    return before if before is not None and is_original(before, model, found) else None
