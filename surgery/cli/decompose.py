"""``surgery decompose`` and ``surgery reconstruct``: cut a model, and fuse the chains back."""

from __future__ import annotations

import argparse
from pathlib import Path

import surgery
from surgery.cli.arguments import Commands, add_command, add_rank_arguments, open_model, rank_options, show_report
from surgery.cli.batches import add_calibration_argument, calibration_of
from surgery.cli.onnx_files import decompose_file, reconstruct_file, target_of
from surgery.cli.pages import add_page_arguments, check_page_arguments, save_page
from surgery.cli.targets import check_folder


def add(commands: Commands) -> None:
    decompose = add_command(
        commands, "decompose", _decompose, "Decompose a model, or an ONNX file into another, and report what was done.", files=True
    )
    _add_file_arguments(decompose)
    add_rank_arguments(decompose)
    add_calibration_argument(decompose)
    decompose.add_argument("--out", metavar="FOLDER", type=Path, help="save the network: plan.json and model.safetensors")
    add_page_arguments(decompose)
    text = "Fuse the chains of a decomposed network, or of an ONNX file, back into the original architecture."
    reconstruct = add_command(commands, "reconstruct", _reconstruct, text, files=True)
    _add_file_arguments(reconstruct)
    reconstruct.add_argument("--out", metavar="FOLDER", type=Path, help="save the network there")


def _add_file_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="OUT", nargs="?", type=Path, help="the ONNX file to write where MODEL is one")
    parser.add_argument("--no-check", action="store_true", help="write the ONNX file without running it")


def _decompose(options: argparse.Namespace) -> None:
    target = target_of(options)
    if target is not None:
        decompose_file(options, target)
        return
    check_page_arguments(options)
    check_folder("--out", options.out)
    batches = calibration_of(options)
    model, inputs = open_model(options)
    net = surgery.decompose(model, options.ranks, example_inputs=inputs, calibration=batches, progress=True, **rank_options(options))
    if options.out is not None:
        surgery.save(net, options.out)
    times = None if options.html is None else save_page(options, net, inputs, model)
    show_report(options, net, times)


def _reconstruct(options: argparse.Namespace) -> None:
    target = target_of(options)
    if target is not None:
        reconstruct_file(options, target)
        return
    if options.out is None:
        options.wrong("--out FOLDER is required where MODEL is no ONNX file")
    check_folder("--out", options.out)
    model, _ = open_model(options)
    net = surgery.reconstruct(model)
    surgery.save(net, options.out)
    show_report(options, net)
