"""Commands on ONNX files: MODEL is the file, what is written is one too."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import surgery
from surgery.cli.arguments import is_onnx_file, rank_options, show
from surgery.cli.batches import calibration_of
from surgery.cli.targets import check_file
from surgery.files import usable_target

__all__ = ["decompose_file", "plan_file", "reconstruct_file", "report_file", "target_of"]

ONLY_FOR_MODELS = ("architecture", "weights", "effective_weights", "pareto", "picture", "explain", "out", "before", "time", "diff", "by")


def refuse_options(options: argparse.Namespace, allowed: tuple[str, ...] = ()) -> None:
    """Wrong usage where an option is given that files do not have."""
    for name in ONLY_FOR_MODELS:
        if name not in allowed and getattr(options, name, None):
            options.wrong(f"--{name.replace('_', '-')} is not for ONNX files")


def target_of(options: argparse.Namespace) -> Path | None:
    """The file that a command on an ONNX file writes; None where MODEL is none. Wrong usage where one is without the other."""
    if not is_onnx_file(options.model):
        if options.file is not None:
            options.wrong(f"{options.file}: OUT is for MODELs that are ONNX files; save others with --out FOLDER")
        return None
    if options.file is None:
        options.wrong(f"{options.model}: name the ONNX file to write after it")
    refuse_options(options)
    found: Path = options.file
    return found


def decompose_file(options: argparse.Namespace, target: Path) -> None:
    if options.html is not None:
        usable_target("--html", options.html)
    done = surgery.decompose_onnx(
        options.model,
        target,
        options.ranks,
        example_inputs=_noise(options),
        calibration=calibration_of(options),
        check=not options.no_check,
        progress=True,
        **_rank_options(options),
    )
    _show(options, done)


def reconstruct_file(options: argparse.Namespace, target: Path) -> None:
    _show(options, surgery.reconstruct_onnx(options.model, target, example_inputs=_noise(options), check=not options.no_check))


def plan_file(options: argparse.Namespace) -> None:
    refuse_options(options, allowed=("out",))
    check_file("--out", options.out)
    batches = calibration_of(options)
    plan = surgery.plan_onnx(options.model, options.ranks, example_inputs=_noise(options), calibration=batches, **_rank_options(options))
    if options.out is not None:
        plan.save(options.out)
    from surgery.tables import plan_table

    show(options, lambda: plan_table(plan), plan.to_json)


def report_file(options: argparse.Namespace, *, summary: bool) -> None:
    refuse_options(options)
    if getattr(options, "html", None) is not None:
        usable_target("--html", options.html)
    found = surgery.report_onnx(options.model, example_inputs=_noise(options))
    _save_page(options, found)
    from surgery.tables import report_table, summary_table

    show(options, lambda: (summary_table if summary else report_table)(found), found.to_json)


def _save_page(options: argparse.Namespace, report: surgery.Report) -> None:
    if getattr(options, "html", None) is not None:
        report.save_html(options.html, f"Surgery report: {options.model}")


def _rank_options(options: argparse.Namespace) -> dict[str, Any]:
    chosen = rank_options(options)
    del chosen["effective_weights"]
    return chosen


def _noise(options: argparse.Namespace) -> Any:
    import torch

    return None if options.input_shape is None else torch.randn(options.input_shape, generator=torch.Generator().manual_seed(0))


def _show(options: argparse.Namespace, done: surgery.OnnxResult) -> None:
    import json

    _save_page(options, done.report)
    from rich.console import Group

    from surgery.tables import report_table

    show(options, lambda: Group(report_table(done.report), done.told()), lambda: json.dumps(done.to_data(), indent=1) + "\n")
