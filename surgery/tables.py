"""Tables for people: the only place where numbers become text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from passes.watching import COMPUTED

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table

    from passes.watching import FunctionUse
    from surgery.alternatives import Alternative, Tradeoff
    from surgery.export import ExportReport
    from surgery.plan import Plan
    from surgery.report import LayerReport, Report

USUAL = ("tucker", "svd")

__all__ = [
    "USUAL",
    "change",
    "count",
    "explain_table",
    "export_table",
    "factorization_text",
    "function_text",
    "plan_table",
    "print_table",
    "ratio",
    "render",
    "report_table",
    "summary_table",
    "to_html",
    "tradeoff_table",
]


def count(number: int | None) -> str:
    """A count with a unit a person can read: 853k, 1.33M."""
    if number is None:
        return "-"
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:  # what rounds to 1 of the unit
            return f"{number / size:.3g}{unit}"
    return str(number)


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def report_table(report: Report) -> RenderableType:
    """A row a layer, then the totals; where there is little room what a layer was stands below its name."""
    totals = (change(report.params_before, report.params_after), change(report.macs_before, report.macs_after))
    rows = [_report_cells(row) for row in report.layers]
    rows.append(("network", "", "", "", *totals, ratio(report.compression), ratio(report.speedup)))
    table = fitting(("layer", "was"), ("ranks", "error", "params", "MACs", "M", "E"), rows)
    kept = [r for r in report.layers if r.status == "kept"]
    cut = len(report.layers) - len(kept)
    lines = [f"{cut} of {len(report.layers)} layers decomposed" + (f"; passes: {', '.join(report.passes)}" if report.passes else "")]
    if cut:
        told = f"the layers' outputs on {report.calibrated:,} calibration examples" if report.calibrated else "the weights alone"
        lines.append(f"ranks and factors by {told}")
    lines += [str(report.latency)] if report.latency is not None else []
    lines += [f"kept {row.name or '(the model)'}: {row.reason}" for row in kept]
    lines += [f"function in {f.module or '(the model)'}: {function_text(f)}" for f in report.functions]
    from rich.console import Group

    return Group(table, "", *lines)


def plan_table(plan: Plan) -> RenderableType:
    """A row a layer: its ranks, or why it is kept."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layer", overflow="fold")
    table.add_column("kind", no_wrap=True)
    table.add_column("ranks", justify="right", no_wrap=True)
    table.add_column("why kept")
    for name, decision in plan.items():
        data: dict[str, Any] = decision.to_json()
        kind = data.pop("kind")
        reason = data.pop("reason", "")
        table.add_row(name or "(the model)", kind, _ranks(tuple(data.values()) or None), reason)
    if plan.latency is not None:
        from rich.console import Group

        return Group(table, "", str(plan.latency))
    return table


def export_table(export: ExportReport) -> RenderableType:
    """A row a fact about an exported file."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("file", no_wrap=True)
    table.add_column(export.path, overflow="fold")
    shapes = [", ".join("x".join(map(str, shape)) for shape in shapes) for shapes in export.checked_shapes]
    table.add_row("format", export.format if export.opset is None else f"{export.format}, opset {export.opset}")
    table.add_row("exporter", export.exporter)
    table.add_row("size", f"{export.size_bytes / 1e6:.2f} MB")
    table.add_row("inputs", "; ".join(export.inputs))
    table.add_row("checked", "no" if export.difference is None else f"agrees to {export.difference:.1e} on {' and '.join(shapes)}")
    return table


def tradeoff_table(found: Tradeoff) -> RenderableType:
    """A row a budget: what is used of the network, the error, and how many layers are cut."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in (f"share of {found.words}", "used", "error", "layers cut"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in found.rows:
        table.add_row(f"{row.share:.2f}", f"{row.used:.3f}", f"{row.error:.3f}", str(row.cut))
    return table


def explain_table(near: Sequence[Alternative]) -> RenderableType:
    """A row an alternative for one layer; the one that the plan takes is marked."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    for heading in ("ranks", "cost", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in near:
        data: dict[str, Any] = one.decision.to_json()
        kind = data.pop("kind")
        data.pop("reason", None)
        cost = f"{one.cost:,}" if isinstance(one.cost, int) else f"{1e3 * one.cost:.3g} ms"
        table.add_row("->" if one.chosen else "", kind, _ranks(tuple(data.values()) or None), cost, f"{one.error:.3f}")
    return table


def summary_table(report: Report) -> RenderableType:
    """A row a layer: what it is, its parameters and MACs; where there is little room what it is stands below its name."""
    rows = [
        (
            row.name or "(the model)",
            row.layer,
            "-" if row.calls is None else str(row.calls),
            "x".join(map(str, row.output_shape or ())),
            count(row.params_after),
            count(row.macs_after),
        )
        for row in report.layers
    ]
    rows.append(("network", "", "", "", count(report.params_after), count(report.macs_after)))
    return fitting(("layer", "is"), ("calls", "output", "params", "MACs"), rows)


def fitting(texts: tuple[str, str], numbers: Sequence[str], rows: Sequence[Sequence[str]]) -> RenderableType:
    """A table with a name and a description in front, side by side where there is room for it, else one below the other; no number is ever cut.

    Args:
        texts: headings of the first two columns.
        numbers: those of the others.
        rows: of cells.
    """
    wide, narrow = _table(texts, numbers), _table(texts[:1], numbers, close=True)
    for name, description, *others in rows:
        wide.add_row(name, description, *others)
        narrow.add_row(f"{name}\n  {description}" if description else name, *others)
    return _Fitting(wide, narrow)


@dataclass(frozen=True, slots=True)
class _Fitting:
    wide: Table
    narrow: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        room = console.measure(self.wide, options=options.update(width=10_000, max_width=10_000)).maximum
        yield self.wide if room <= options.max_width else self.narrow


def _table(texts: Sequence[str], numbers: Sequence[str], *, close: bool = False) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", collapse_padding=close)
    for heading in texts:
        table.add_column(heading, overflow="fold")
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def print_table(table: RenderableType) -> None:
    """A table on stdout: in colour and as wide as a terminal where it is one, else plain and wide."""
    import sys

    from rich.console import Console

    if sys.stdout.isatty():
        Console(highlight=False, markup=False, emoji=False).print(table)
    else:
        print(render(table))


def to_html(table: RenderableType) -> str:
    """A table as HTML for a notebook, which brings its own style. What is in it is only ever text."""
    from rich.console import Group
    from rich.table import Table

    from surgery.page.markup import Markup, element, joined

    if isinstance(table, Group):
        return joined(*(Markup(to_html(part)) for part in table.renderables))
    if isinstance(table, _Fitting):
        return to_html(table.wide)
    if not isinstance(table, Table):
        return element("div", table) if str(table) else ""
    head = element("tr", *(element("th", column.header) for column in table.columns))
    rows = zip(*(column.cells for column in table.columns), strict=True)
    return element("table", element("thead", head), element("tbody", *(element("tr", *(element("td", cell) for cell in row)) for row in rows)))


def render(table: RenderableType, width: int = 160) -> str:
    """A table as plain text."""
    from rich.console import Console

    console = Console(width=width, no_color=True, highlight=False, force_terminal=False, emoji=False, markup=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _report_cells(row: LayerReport) -> tuple[str, ...]:
    cut = row.status == "decomposed"
    return (
        row.name or "(the model)",
        row.layer,
        factorization_text(row) if cut else "kept",
        "-" if row.error is None else f"{row.error:.3f}",
        change(row.params_before, row.params_after),
        change(row.macs_before, row.macs_after),
        ratio(row.compression) if cut else "",
        ratio(row.speedup) if cut else "",
    )


def function_text(function: FunctionUse) -> str:
    shape = "x".join(map(str, function.weight_shape))
    weight = f"a computed weight {shape}" if function.weight == COMPUTED else f"{function.weight} {shape}"
    calls = "1 call" if len(function.calls) == 1 else f"{len(function.calls)} calls"
    return f"{function.function} with {weight}, {calls}, {count(function.macs)} MACs; not a layer, so never cut"


def _ranks(ranks: tuple[int | None, ...] | None) -> str:
    return "" if ranks is None else ", ".join("full" if r is None else str(r) for r in ranks)


def factorization_text(row: LayerReport) -> str:
    """Ranks, after the name of the kind unless the number of ranks says it: two are Tucker's, one of a layer of one pixel is SVD's."""
    return _ranks(row.ranks) if row.kind in USUAL else f"{row.kind} {_ranks(row.ranks)}"


def change(before: int | None, after: int | None) -> str:
    return count(before) if before == after else f"{count(before)} -> {count(after)}"
