"""What several commands share: MODEL and how to open it, the options that choose ranks, a result as a table or as JSON."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import surgery
from surgery.decompose import DEFAULT
from surgery.options import Options
from surgery.plan import no_duplicates
from surgery.ranks.request import parse_ranks

if TYPE_CHECKING:
    from rich.console import RenderableType
    from torch import Tensor, nn

    from surgery.benchmark import Benchmark

__all__ = [
    "MOST",
    "Commands",
    "add_command",
    "add_model_arguments",
    "add_rank_arguments",
    "count",
    "is_onnx_file",
    "open_model",
    "option",
    "parse_ranks_text",
    "rank_options",
    "runtime_names",
    "shape",
    "show",
    "show_report",
    "timed_names",
]

MOST = 2**40  # numbers that an input may hold: no memory does

RULES = ("evbmf", "energy", "stable", "budget")  # that may have options after a colon
Commands = Any
"""What ``ArgumentParser.add_subparsers`` gives."""

MODEL_HELP = "torchvision:NAME, timm:NAME, surgery:NAME (bundled), package.module:factory, or a folder written by surgery.save"
FILE_HELP = f"{MODEL_HELP}; or an ONNX file (.onnx)"


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], None], text: str, *, files: bool = False
) -> argparse.ArgumentParser:
    """A command that takes MODEL, which may be an ONNX file if ``files``, and ``--json``."""
    made: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    add_model_arguments(made, model_help=FILE_HELP if files else MODEL_HELP)
    made.add_argument("--json", action="store_true", help="print JSON for machines instead of a table")
    made.set_defaults(run=run, wrong=made.error)
    return made


def add_model_arguments(parser: argparse.ArgumentParser, default: str | None = None, model_help: str = MODEL_HELP) -> None:
    """MODEL, which need not be given where there is a default, and what is needed to run it."""
    parser.add_argument("model", metavar="MODEL", nargs=None if default is None else "?", type=model_text, default=default, help=model_help)
    parser.add_argument("--architecture", metavar="NAME", help="what a saved folder is a checkpoint of, written like MODEL, where it does not say so")
    parser.add_argument("--weights", metavar="FILE", type=Path, help="state dict to fill the model with: .safetensors, or written by torch.save")
    parser.add_argument(
        "--input-shape",
        metavar="N,C,H,W",
        type=shape,
        help="shape of the one input, filled with noise (default: what the model is usually given)",
    )


def model_text(text: str) -> str:
    """MODEL as it stands; what has neither the form of a name nor is on the disk is wrong usage."""
    if ":" not in text and not is_onnx_file(text) and not os.path.exists(text):  # which says no, too, where nobody may look
        raise argparse.ArgumentTypeError(f"{text!r}: expected {MODEL_HELP}")
    return text


def is_onnx_file(model: str) -> bool:
    """Whether MODEL names an ONNX file."""
    return Path(model).suffix == ".onnx"


def open_model(options: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """The model that MODEL and ``--weights`` name, and an input."""
    if is_onnx_file(options.model):
        raise surgery.SurgeryValueError(f"{options.model}: this command takes no ONNX file")
    import torch

    from surgery.zoo import load_weights, make

    model, shape = make(options.model, options.architecture)
    if options.weights is not None:
        load_weights(model, options.weights)
    return model, torch.randn(options.input_shape or shape, generator=torch.Generator().manual_seed(0))


def parse_ranks_text(text: str) -> Any:
    """``--ranks`` as ``surgery.decompose`` takes it: a fraction, a JSON object of layers, a rule by name or package.module:name, a plan's path.

    What means nothing is wrong usage; what is wrong in a plan's file is not.
    """
    value = _value_in(text)
    if not (isinstance(value, str) and (value.endswith(".json") or os.path.exists(value))):
        try:
            parse_ranks(value)
        except surgery.SurgeryError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return value


def _value_in(text: str) -> Any:
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text, object_pairs_hook=no_duplicates)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"not a JSON object: {error}") from error
    try:
        value = float(text)
    except ValueError:
        module, _, name = text.partition(":")
        if name.isidentifier() and module not in RULES:
            return own_rule(module, name)
        return text
    return int(text) if text.strip().lstrip("+-").isdigit() else value


def own_rule(module: str, name: str) -> Callable[..., Any]:
    """A rank rule of the user's own."""
    from surgery.naming import callable_named

    try:
        return callable_named(module, name, "--ranks", f"rule of that name ({', '.join(RULES)})")
    except surgery.SurgeryError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_rank_arguments(parser: argparse.ArgumentParser) -> None:
    ranks_help = "evbmf, evbmf:weaken=W, energy:P, stable, a fraction in (0, 1], a JSON object of layers, a plan's file, budget:macs=SHARE, "
    ranks_help += "budget:latency=SHARE,runtime=NAME and the like, or package.module:function, a rule of your own (default: %(default)s)"
    parser.add_argument("--ranks", type=parse_ranks_text, default="evbmf", help=ranks_help)
    parser.add_argument(
        "--method",
        type=option("method", str),
        default=DEFAULT.method,
        help="tucker, spatial, channel, depthwise, cp, auto or svd (default: %(default)s)",
    )
    parser.add_argument("--include", action="append", metavar="NAME", help="cut only these layers; a name or re:PATTERN, repeatable")
    parser.add_argument("--exclude", action="append", metavar="NAME", help="keep these layers; a name or re:PATTERN, repeatable")
    parser.add_argument(
        "--guard", type=option("guard", str), default=DEFAULT.guard, help="macs, latency, latency:RUNTIME, step or none (default: %(default)s)"
    )
    parser.add_argument(
        "--round-to", type=option("round_to", int), default=DEFAULT.round_to, help="round ranks up to a multiple of this (default: %(default)s)"
    )
    parser.add_argument("--effective-weights", action="store_true", help="cut also layers whose weight is computed, by what it amounts to now")
    parser.add_argument("--device", default=DEFAULT.device, help="where to compute, for example cuda (default: the model's device)")


def option(name: str, kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Reads an option of ``surgery.decompose``; a value that it would not take is wrong usage."""

    def read(text: str) -> Any:
        value = kind(text)  # argparse words the error of a text that is none
        try:
            Options(**{name: value})
        except surgery.SurgeryError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return value

    read.__name__ = kind.__name__

    return read


def rank_options(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("method", "include", "exclude", "guard", "round_to", "device", "effective_weights")}


def show_report(options: argparse.Namespace, model: nn.Module, benchmark: Benchmark | None = None) -> None:
    from surgery.tables import report_table

    found = surgery.report(model, benchmark=benchmark)
    show(options, lambda: report_table(found), found.to_json)


def show(options: argparse.Namespace, table: Callable[[], RenderableType], as_json: Callable[[], str]) -> None:
    from surgery.tables import print_table

    if options.json:
        print(as_json(), end="")
    else:
        print_table(table())


def count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def shape(text: str) -> tuple[int, ...]:
    """Reads positive numbers with commas or ``x`` between them."""
    try:
        found = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1 or math.prod(found) > MOST:
        raise argparse.ArgumentTypeError(f"expected positive numbers such as 1,3,224,224, got {text!r}")
    return found


def runtime_names(text: str) -> list[str]:
    """Reads runtimes with commas between them."""
    from surgery.benchmarking.runtimes import RUNTIMES

    return _names_among(RUNTIMES, text)


def timed_names(text: str) -> list[str]:
    """Reads runtimes that time single layers too, with commas between them."""
    from surgery.cost.chains import RUNTIMES

    return _names_among(RUNTIMES, text, ", which time single layers")


def _names_among(known: Collection[str], text: str, which: str = "") -> list[str]:
    found = text.split(",")
    for name in found:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {list(known)}{which}")
    return found
