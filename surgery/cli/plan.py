"""``surgery plan``: ranks without a cut, the trade-off behind them, a layer's alternatives."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import surgery
from surgery.cli.arguments import Commands, add_command, add_rank_arguments, is_onnx_file, open_model, rank_options, show
from surgery.cli.batches import add_calibration_argument, calibration_of
from surgery.cli.onnx_files import plan_file
from surgery.cli.targets import check_file


def add(commands: Commands) -> None:
    plan = add_command(commands, "plan", _plan, "Choose ranks and print or save the plan; the model is not changed.", files=True)
    add_rank_arguments(plan)
    add_calibration_argument(plan)
    plan.add_argument("--out", metavar="FILE", type=Path, help="save the plan as JSON")
    plan.add_argument("--pareto", action="store_true", help="show the least error at every budget")
    plan.add_argument("--picture", metavar="FILE", type=Path, help="draw that")
    plan.add_argument("--explain", metavar="LAYER", help="show what the plan does with a layer among its nearest alternatives")
    plan.add_argument("--by", metavar="UNIT", help="what both count: macs (the default), params, latency or latency:RUNTIME")
    plan.add_argument("--diff", metavar="FILE", type=Path, help="show what changes from a saved plan to this one")


def _plan(options: argparse.Namespace) -> None:
    if is_onnx_file(options.model):
        plan_file(options)
        return
    _check(options)
    batches = calibration_of(options)
    model, inputs = open_model(options)
    plan = surgery.plan(model, options.ranks, example_inputs=inputs, calibration=batches, progress=True, **rank_options(options))
    table, as_json = _shown(options, plan, model, inputs, batches)
    if options.out is not None:  # when nothing can fail any more
        plan.save(options.out)
    show(options, table, as_json)


def _check(options: argparse.Namespace) -> None:
    """Refuse what could not be shown or written in the end, before minutes are spent on a plan."""
    from surgery.alternatives import unit_of
    from surgery.plots import picture_file

    curve = options.pareto or options.picture is not None
    asked = [name for name, given in (("--pareto, --picture", curve), ("--explain", options.explain), ("--diff", options.diff)) if given]
    if len(asked) > 1:
        options.wrong(f"{' and '.join(asked)}: one of them at a time")
    if options.by is not None:
        if asked in ([], ["--diff"]):
            options.wrong("--by: it is for --pareto, --picture and --explain")
        try:
            unit_of(options.by, ())
        except surgery.SurgeryValueError as error:
            options.wrong(str(error))
    check_file("--out", options.out)
    check_file("--picture", options.picture)
    if options.picture is not None:
        picture_file(options.picture)
    if options.diff is not None:
        surgery.Plan.load(options.diff)


def _shown(options: argparse.Namespace, plan: surgery.Plan, model: Any, inputs: Any, batches: Any) -> tuple[Callable[[], Any], Callable[[], str]]:
    """What was asked for, as a table and as JSON."""
    from surgery.tables import explain_table, plan_table, tradeoff_table

    chosen = rank_options(options)
    if options.pareto or options.picture is not None:
        from surgery.alternatives import tradeoff

        found = tradeoff(model, example_inputs=inputs, calibration=batches, by=options.by, **chosen)
        if options.picture is not None:
            found.save_picture(options.picture)
        return lambda: tradeoff_table(found), lambda: json.dumps(found.to_data(), indent=1)
    if options.explain is not None:
        from surgery.alternatives import explain

        near = explain(model, options.explain, plan, example_inputs=inputs, calibration=batches, by=options.by, **chosen)
        as_data = [{"decision": a.decision.to_json(), "cost": a.cost, "error": a.error, "chosen": a.chosen} for a in near]
        return lambda: explain_table(near), lambda: json.dumps(as_data, indent=1)
    if options.diff is not None:
        changes = surgery.Plan.load(options.diff).diff(plan)
        rows = [{"site": c.site, "before": c.before and c.before.to_json(), "after": c.after and c.after.to_json()} for c in changes]
        return lambda: "\n".join(map(str, changes)) or "nothing changes", lambda: json.dumps(rows, indent=1)
    return lambda: plan_table(plan), plan.to_json
