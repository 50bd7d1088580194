"""What can be had of a network: the least error at every budget, by kind, and the plan for one of them.

    python examples/plan.py [MODEL] [--budget 0.5] [--kinds tucker channel spatial auto] [--out plan.json] [--picture curves.png]

MODEL is written as on the command line. Errors are those of the weights (root mean square of |W - W'|_F / |W|_F over the layers); the picture needs
matplotlib.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import surgery
from surgery.alternatives import Tradeoff
from surgery.cli import add_model_arguments, check_file, guarded, open_model
from surgery.plots import picture_file


def draw(curves: Mapping[str, Tradeoff], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5))
    axis = figure.subplots()
    for kind, curve in curves.items():
        axis.plot([row.used for row in curve.rows], [row.error for row in curve.rows], marker=".", label=kind)
    axis.set_xlabel("share of the network's MACs")
    axis.set_ylabel("error")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def run(options: argparse.Namespace) -> None:
    check_file("--out", options.out)  # what could not be written is said before any work
    check_file("--picture", options.picture)
    if options.picture is not None:
        picture_file(options.picture)
    model, inputs = open_model(options)
    curves = {kind: surgery.tradeoff(model, example_inputs=inputs, method=kind, shares=options.shares) for kind in options.kinds}
    print("share of MACs  " + "".join(f"{kind:>10}" for kind in curves))
    for share in options.shares:
        errors = [{row.share: f"{row.error:.3f}" for row in curve.rows}.get(share, "-") for curve in curves.values()]
        print(f"{share:13.2f}  " + "".join(f"{error:>10}" for error in errors))

    best = options.kinds[-1]
    plan = surgery.plan(model, surgery.Budget(macs=options.budget), example_inputs=inputs, method=best)
    print(f"\nat {options.budget} of the MACs, method={best!r}:\n{plan}")
    if options.out is not None:
        plan.save(options.out)
    if options.picture is not None:
        draw(curves, options.picture)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, default="surgery:resnet20")
    parser.add_argument("--budget", type=float, default=0.5, help="share of the MACs for the plan (default: %(default)s)")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.9, 0.7, 0.5, 0.3], help="of the table")
    parser.add_argument("--kinds", nargs="+", default=["tucker", "channel", "spatial", "auto"], help="methods; the last one makes the plan")
    parser.add_argument("--out", type=Path, help="file for the plan")
    parser.add_argument("--picture", type=Path, help="file for the curves")
    options = parser.parse_args(arguments)
    return guarded(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
