"""The command line: one command a function. Results go to stdout, progress and errors to stderr.

Exit codes: 0 done, 1 could not, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import surgery
from surgery.decompose import DEFAULT
from surgery.plan import no_duplicates
from surgery.planning import Options
from surgery.ranks.budget import RUNTIMES

if TYPE_CHECKING:
    from rich.console import RenderableType
    from torch import Tensor, nn

__all__ = ["add_model_arguments", "main", "open_model", "parse_ranks_text"]

MODEL_HELP = "torchvision:NAME, timm:NAME, surgery:NAME (bundled), package.module:factory, or a folder written by surgery.save"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    return guarded(lambda: options.run(options))


def guarded(action: Callable[[], None]) -> int:
    """Run an action; an error that users can act on becomes one line on stderr and exit code 1."""
    try:
        action()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (surgery.SurgeryError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
    return 0


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL and what is needed to run it."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--architecture", metavar="NAME", help="what a saved folder is a checkpoint of, written like MODEL, where it does not say so")
    parser.add_argument("--weights", metavar="FILE", type=Path, help="state dict to fill the model with: .safetensors, or written by torch.save")
    parser.add_argument(
        "--input-shape",
        metavar="N,C,H,W",
        type=_shape,
        help="shape of the one input, filled with noise (default: what the model is usually given)",
    )


def open_model(options: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """The model that MODEL and ``--weights`` name, and an input."""
    import torch

    from surgery.zoo import load_weights, make

    model, shape = make(options.model, options.architecture)
    if options.weights is not None:
        load_weights(model, options.weights)
    return model, torch.randn(options.input_shape or shape, generator=torch.Generator().manual_seed(0))


def parse_ranks_text(text: str) -> Any:
    """``--ranks`` as ``surgery.decompose`` takes it: a fraction, a JSON object of layers, the name of a rule, or the path of a plan."""
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text, object_pairs_hook=no_duplicates)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"not a JSON object: {error}") from error
    try:
        value = float(text)
    except ValueError:
        return text
    return int(text) if text.strip().lstrip("+-").isdigit() else value


def _summary(options: argparse.Namespace) -> None:
    model, inputs = open_model(options)
    found = surgery.report(surgery.decompose(model, {}, example_inputs=inputs))
    from surgery.tables import summary_table

    _show(options, lambda: summary_table(found), found.to_json)


def _plan(options: argparse.Namespace) -> None:
    model, inputs = open_model(options)
    plan = surgery.plan(model, options.ranks, example_inputs=inputs, progress=True, **_rank_options(options))
    if options.out is not None:
        plan.save(options.out)
    from surgery.tables import explain_table, plan_table, tradeoff_table

    chosen = _rank_options(options)
    if options.pareto or options.picture is not None:
        from surgery.alternatives import tradeoff

        found = tradeoff(model, example_inputs=inputs, **chosen)
        if options.picture is not None:
            found.save_picture(options.picture)
        _show(options, lambda: tradeoff_table(found), lambda: json.dumps(found.to_data(), indent=1))
    elif options.explain is not None:
        from surgery.alternatives import explain

        near = explain(model, options.explain, plan, example_inputs=inputs, **chosen)
        as_data = [{"decision": a.decision.to_json(), "cost": a.cost, "error": a.error, "chosen": a.chosen} for a in near]
        _show(options, lambda: explain_table(near), lambda: json.dumps(as_data, indent=1))
    else:
        _show(options, lambda: plan_table(plan), plan.to_json)


def _decompose(options: argparse.Namespace) -> None:
    model, inputs = open_model(options)
    net = surgery.decompose(model, options.ranks, example_inputs=inputs, progress=True, **_rank_options(options))
    if options.out is not None:
        surgery.save(net, options.out)
    _show_report(options, net)


def _reconstruct(options: argparse.Namespace) -> None:
    model, _ = open_model(options)
    net = surgery.reconstruct(model)
    surgery.save(net, options.out)
    _show_report(options, net)


def _export(options: argparse.Namespace) -> None:
    model, inputs = open_model(options)
    export_to(model, options.out, inputs, opset=options.opset, dynamic_batch=options.dynamic_batch, as_json=options.json)


def export_to(model: nn.Module, out: Path, inputs: Tensor, *, opset: int | None, dynamic_batch: bool, as_json: bool) -> None:
    """Export in the format that the file's ending names, and print what came out."""
    if out.suffix == ".onnx":
        done = surgery.export_onnx(model, out, inputs, dynamic_batch=dynamic_batch, opset=opset)
    elif out.suffix in (".pt", ".torchscript", ".ts"):
        if opset is not None or dynamic_batch:
            raise surgery.SurgeryValueError("--opset and --dynamic-batch are for ONNX; TorchScript takes any batch as it is")
        done = surgery.export_torchscript(model, out, inputs)
    else:
        raise surgery.SurgeryValueError(f"OUT {str(out)!r}: the ending names the format: .onnx for ONNX, .pt for TorchScript")
    print(json.dumps(done.to_data()) if as_json else done)


def _bench(options: argparse.Namespace) -> None:
    model, inputs = open_model(options)
    net = surgery.decompose(model, options.ranks, example_inputs=inputs, progress=True, **_rank_options(options))
    runtimes = options.runtimes.split(",")
    measured = surgery.benchmark(surgery.reconstruct(model), net, inputs, runtimes=runtimes, repeats=options.repeats, threads=options.threads)
    from surgery.tables import benchmark_table

    _show(options, lambda: benchmark_table(measured), measured.to_json)


def _profile(options: argparse.Namespace) -> None:
    from surgery.cost.profile import read_shapes
    from surgery.latency import profile_of

    found = profile_of(read_shapes(options.shapes), options.out, options.runtime, options.threads)
    print(found.to_json() if options.json else f"{options.out}: {len(found.entries)} times in {found.device['runtime']}")


def _report(options: argparse.Namespace) -> None:
    model, _ = open_model(options)
    _show_report(options, model)


def _rank_options(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("method", "include", "exclude", "guard", "round_to", "device", "effective_weights")}


def _show_report(options: argparse.Namespace, model: nn.Module) -> None:
    from surgery.tables import report_table

    found = surgery.report(model)
    _show(options, lambda: report_table(found), found.to_json)


def _show(options: argparse.Namespace, table: Callable[[], RenderableType], as_json: Callable[[], str]) -> None:
    from surgery.tables import print_table

    if options.json:
        print(as_json(), end="")
    else:
        print_table(table())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="surgery", description="Decompose convolutional networks, fuse them back, export and measure.")
    parser.add_argument("--version", action="version", version=f"surgery {surgery.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        add_model_arguments(made)
        made.add_argument("--json", action="store_true", help="print JSON for machines instead of a table")
        made.set_defaults(run=run)
        return made

    command("summary", _summary, "List the layers of a model: parameters, MACs, and whether anything was done to them.")
    plan = command("plan", _plan, "Choose ranks and print or save the plan; the model is not changed.")
    _add_rank_arguments(plan)
    plan.add_argument("--out", metavar="FILE", type=Path, help="save the plan as JSON")
    plan.add_argument("--pareto", action="store_true", help="show the least error at every budget")
    plan.add_argument("--picture", metavar="FILE", type=Path, help="draw that")
    plan.add_argument("--explain", metavar="LAYER", help="show what the plan does with a layer among its nearest alternatives")
    decompose = command("decompose", _decompose, "Decompose a model and report what was done.")
    _add_rank_arguments(decompose)
    decompose.add_argument("--out", metavar="FOLDER", type=Path, help="save the network: plan.json and model.safetensors")
    reconstruct = command("reconstruct", _reconstruct, "Fuse the chains of a decomposed network back into the original architecture.")
    reconstruct.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="save the network there")
    export = command("export", _export, "Export a model and check the file against it: OUT.onnx or OUT.pt (TorchScript).")
    export.add_argument("out", metavar="OUT", type=Path)
    export.add_argument("--opset", type=int, help="ONNX operator set")
    export.add_argument("--dynamic-batch", action="store_true", help="leave the batch dimension open (ONNX)")
    bench = command("bench", _bench, "Decompose a model and time it against the original, side by side.")
    _add_rank_arguments(bench)
    bench.add_argument(
        "--runtimes", default="eager,onnxruntime", help="comma-separated: eager, compile, onnxruntime, openvino (default: %(default)s)"
    )
    bench.add_argument("--repeats", type=int, default=30, help="pairs of samples a runtime (default: %(default)s)")
    bench.add_argument("--threads", type=int, help="threads for both networks (default: torch's)")
    text = "Time a list of shapes on this device, for plans made elsewhere (Budget(latency=..., profile=OUT) names the list)."
    profile = commands.add_parser("profile", help=text, description=text)
    profile.add_argument("shapes", metavar="SHAPES", type=Path, help="the list that a plan with an incomplete profile wrote")
    profile.add_argument("--out", metavar="FILE", type=Path, required=True, help="the profile: made, or added to")
    profile.add_argument("--runtime", choices=RUNTIMES, default=RUNTIMES[0], help="what to time in (default: %(default)s)")
    profile.add_argument("--threads", type=_count, help="how many threads (default: torch's)")
    profile.add_argument("--json", action="store_true", help="print JSON for machines instead of a line")
    profile.set_defaults(run=_profile)
    command("report", _report, "Show what was done to a saved network.")
    return parser


def _add_rank_arguments(parser: argparse.ArgumentParser) -> None:
    ranks_help = "evbmf, evbmf:weaken=W, energy:P, stable, a fraction in (0, 1], a JSON object of layers, a plan's file, or budget:macs=SHARE, "
    ranks_help += "budget:latency=SHARE,runtime=NAME and the like (default: %(default)s)"
    parser.add_argument("--ranks", type=parse_ranks_text, default="evbmf", help=ranks_help)
    parser.add_argument(
        "--method",
        type=_option("method", str),
        default=DEFAULT.method,
        help="tucker, spatial, channel, depthwise, cp, auto or svd (default: %(default)s)",
    )
    parser.add_argument("--include", action="append", metavar="NAME", help="cut only these layers; a name or re:PATTERN, repeatable")
    parser.add_argument("--exclude", action="append", metavar="NAME", help="keep these layers; a name or re:PATTERN, repeatable")
    parser.add_argument("--guard", type=_option("guard", str), default=DEFAULT.guard, help="macs, latency or none (default: %(default)s)")
    parser.add_argument(
        "--round-to", type=_option("round_to", int), default=DEFAULT.round_to, help="round ranks up to a multiple of this (default: %(default)s)"
    )
    parser.add_argument("--effective-weights", action="store_true", help="cut also layers whose weight is computed, by what it amounts to now")
    parser.add_argument("--device", default=DEFAULT.device, help="where to compute, for example cuda (default: the model's device)")


def _option(name: str, kind: Callable[[str], Any]) -> Callable[[str], Any]:
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


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"expected positive numbers such as 1,3,224,224, got {text!r}")
    return shape


if __name__ == "__main__":
    sys.exit(main())
