"""``surgery summary`` and ``surgery report``: the layers of a model, and what was done to them."""

from __future__ import annotations

import argparse

import surgery
from surgery.cli.arguments import Commands, add_command, open_model, show, show_report


def add(commands: Commands) -> None:
    add_command(commands, "summary", _summary, "List the layers of a model: parameters, MACs, and whether anything was done to them.")
    add_command(commands, "report", _report, "Show what was done to a saved network.")


def _summary(options: argparse.Namespace) -> None:
    model, inputs = open_model(options)
    found = surgery.report(surgery.decompose(model, {}, example_inputs=inputs))
    from surgery.tables import summary_table

    show(options, lambda: summary_table(found), found.to_json)


def _report(options: argparse.Namespace) -> None:
    model, _ = open_model(options)
    show_report(options, model)
