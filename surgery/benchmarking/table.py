"""What a benchmark found as a table of at most 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.benchmarking.result import NO_VERDICT
from surgery.tables import count, ratio

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType
    from rich.table import Table

    from surgery.benchmarking.result import Benchmark, LayerResult, RuntimeResult

__all__ = ["benchmark_table"]

EXAMPLE = " on the example inputs"


def benchmark_table(benchmark: Benchmark) -> RenderableType:
    """A row a runtime and batch size: median times, the ratio of times with its spread beside that of FLOPs, and what they come to."""
    from rich.console import Group

    resized = _resized(benchmark)
    parts: list[RenderableType] = [_times(benchmark.rows, resized), "", *_facts(benchmark)]
    if any(row.memory_bytes_before or row.file_bytes_before for row in benchmark.rows):
        parts += ["", _sizes(benchmark.rows, resized)]
    for runtime in dict.fromkeys(layer.runtime for layer in benchmark.layers):
        timed = [layer for layer in benchmark.layers if layer.runtime == runtime]
        parts += ["", f"layers in {runtime}, each by itself{EXAMPLE if resized else ''}:", _layers(timed)]
    return Group(*parts)


def _resized(benchmark: Benchmark) -> bool:
    """Whether a batch was timed that is not that of the example inputs, which all else is told of."""
    given = next((shape[0] for shape in benchmark.input_shapes if shape), None)
    return any(row.batch != given for row in benchmark.rows)


def _times(rows: Sequence[RuntimeResult], resized: bool) -> Table:
    table = _table("runtime", *(["batch"] if resized else []), "before ms", "after ms", "time ratio", "FLOPs", "time/FLOPs", "verdict")
    for row in rows:
        table.add_row(
            row.runtime,
            *([str(row.batch)] if resized else []),
            milliseconds(row.before_ms),
            milliseconds(row.after_ms),
            f"{row.time_ratio:.2f}x ±{row.spread:.2f}",
            ratio(row.flops_ratio),
            _number(row.quotient),
            short(row.verdict),
        )
    return table


def _facts(benchmark: Benchmark) -> list[str]:
    kinds = [text for text in (benchmark.dtype, benchmark.memory_format) if text]
    shapes = ", ".join("x".join(map(str, shape)) for shape in benchmark.input_shapes)
    pairs = "-".join(map(str, sorted({min(row.pairs for row in benchmark.rows), max(row.pairs for row in benchmark.rows)})))
    lines = [
        f"{pairs} interleaved pairs, {benchmark.threads} threads, inputs {', '.join([shapes, *kinds])}",
        *([] if benchmark.macs_before is None else [_macs(benchmark)]),
        "±: half the 99 % confidence interval of the median ratio",
    ]
    if any(row.verdict == NO_VERDICT for row in benchmark.rows):
        lines.append(f"none: {NO_VERDICT}")
    return lines


def _macs(benchmark: Benchmark) -> str:
    where = EXAMPLE if _resized(benchmark) else ""
    return f"MACs{where} {count(benchmark.macs_before)} / {count(benchmark.macs_after)}: FLOPs ratio {ratio(benchmark.flops_ratio)}"


def _sizes(rows: Sequence[RuntimeResult], resized: bool) -> Table:
    table = _table("runtime", *(["batch"] if resized else []), "memory before", "after", "file before", "after")
    for row in rows:
        sizes = (row.memory_bytes_before, row.memory_bytes_after, row.file_bytes_before, row.file_bytes_after)
        if any(size is not None for size in sizes):
            table.add_row(row.runtime, *([str(row.batch)] if resized else []), *map(megabytes, sizes))
    return table


def _layers(layers: Sequence[LayerResult]) -> Table:
    table = _table("layer", "before ms", "after ms", "time ratio", "FLOPs", "time/FLOPs", "verdict")
    for layer in layers:
        table.add_row(
            layer.name or "(the model)",
            milliseconds(layer.before_ms),
            milliseconds(layer.after_ms),
            f"{layer.time_ratio:.2f}x ±{layer.spread:.2f}",
            ratio(layer.flops_ratio),
            _number(layer.quotient),
            short(layer.verdict),
        )
    return table


def _table(first: str, *headings: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    table.add_column(first, no_wrap=first == "runtime", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "verdict" else "right", no_wrap=True)
    return table


def short(verdict: str) -> str:
    return "none" if verdict == NO_VERDICT else verdict


def milliseconds(value: float) -> str:
    """Three significant figures, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.2f} MB"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
