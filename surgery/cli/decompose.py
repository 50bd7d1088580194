"""``surgery decompose`` and ``surgery reconstruct``: cut a model, and fuse the chains back."""

from __future__ import annotations

import argparse
from pathlib import Path

import surgery
from surgery.cli.arguments import Commands, add_command, add_rank_arguments, open_model, rank_options, show_report
from surgery.cli.pages import add_page_arguments, save_page


def add(commands: Commands) -> None:
    decompose = add_command(commands, "decompose", _decompose, "Decompose a model and report what was done.")
    add_rank_arguments(decompose)
    decompose.add_argument("--out", metavar="FOLDER", type=Path, help="save the network: plan.json and model.safetensors")
    add_page_arguments(decompose)
    reconstruct = add_command(commands, "reconstruct", _reconstruct, "Fuse the chains of a decomposed network back into the original architecture.")
    reconstruct.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="save the network there")


def _decompose(options: argparse.Namespace) -> None:
    model, inputs = open_model(options)
    net = surgery.decompose(model, options.ranks, example_inputs=inputs, progress=True, **rank_options(options))
    if options.out is not None:
        surgery.save(net, options.out)
    if options.html is not None:
        save_page(options.html, net, inputs, model, f"Surgery report: {options.model}")
    show_report(options, net)


def _reconstruct(options: argparse.Namespace) -> None:
    model, _ = open_model(options)
    net = surgery.reconstruct(model)
    surgery.save(net, options.out)
    show_report(options, net)
