"""What a benchmark found: rows of numbers, to JSON and to a table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from surgery.benchmarking.sampling import CONFIDENCE, Comparison

__all__ = ["NO_VERDICT", "Benchmark", "LayerResult", "RuntimeResult", "quotient", "verdict"]

FORMAT = "surgery.benchmark"
VERSION = 2
NO_VERDICT = "no verdict: spread larger than the difference"


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeResult:
    """Times on one runtime at one batch size.

    Attributes:
        runtime: its name.
        batch: first dimension of the inputs, None where they have none.
        before_ms: median time of the first network.
        after_ms: median time of the second.
        time_ratio: before / after, the median over pairs of neighbouring samples.
        time_ratio_low: lower end of the confidence interval of that median.
        time_ratio_high: upper end.
        pairs: how many there are.
        settled: whether the interval became as narrow as was asked.
        macs_before: of one call of the first network, a training step's where it is one; None where nothing counts them.
        macs_after: of the second.
        file_bytes_before: of what the runtime reads; None where it reads no file.
        file_bytes_after: of the second network.
        memory_bytes_before: most that the tensors of one call, parameters included, take at once; None where the runtime does not tell.
        memory_bytes_after: of the second network.
    """

    runtime: str
    batch: int | None = None
    before_ms: float
    after_ms: float
    time_ratio: float
    time_ratio_low: float
    time_ratio_high: float
    pairs: int
    settled: bool
    macs_before: int | None = None
    macs_after: int | None = None
    file_bytes_before: int | None = None
    file_bytes_after: int | None = None
    memory_bytes_before: int | None = None
    memory_bytes_after: int | None = None

    @classmethod
    def of(cls, found: Comparison, runtime: str, **more: Any) -> RuntimeResult:
        return cls(
            runtime=runtime,
            before_ms=1e3 * found.before,
            after_ms=1e3 * found.after,
            time_ratio=found.ratio,
            time_ratio_low=found.low,
            time_ratio_high=found.high,
            pairs=found.pairs,
            settled=found.settled,
            **more,
        )

    @property
    def spread(self) -> float:
        """Half the width of the interval of ``time_ratio``."""
        return (self.time_ratio_high - self.time_ratio_low) / 2

    @property
    def verdict(self) -> str:
        """Which is faster, where the whole interval is on one side of 1; else that there is no verdict."""
        return verdict(self.time_ratio_low, self.time_ratio_high)

    @property
    def flops_ratio(self) -> float | None:
        """FLOPs (twice the MACs) before over after."""
        return _ratio(self.macs_before, self.macs_after)

    @property
    def quotient(self) -> float | None:
        """Time ratio over FLOPs ratio: 1 where time falls as FLOPs do."""
        return quotient(self.time_ratio, self.flops_ratio)

    def to_data(self) -> dict[str, Any]:
        derived = {"spread": self.spread, "verdict": self.verdict, "flops_ratio": self.flops_ratio, "quotient": self.quotient}
        return asdict(self) | derived


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerResult:
    """One layer of the first network beside what stands for it in the second, each timed by itself on the input shapes of its calls.

    Attributes:
        runtime: its name.
        name: of the layer.
        chain: geometry of what stands for it, in words.
        before_ms: over all its calls.
        after_ms: over all its calls.
        spread: of the time ratio: two standard errors of both times together.
        macs_before: over all its calls.
        macs_after: over all its calls.
    """

    runtime: str
    name: str
    chain: str
    before_ms: float
    after_ms: float
    spread: float
    macs_before: int
    macs_after: int

    @property
    def time_ratio(self) -> float:
        """Before / after."""
        return self.before_ms / self.after_ms

    @property
    def flops_ratio(self) -> float | None:
        return _ratio(self.macs_before, self.macs_after)

    @property
    def quotient(self) -> float | None:
        """Time ratio over FLOPs ratio."""
        return quotient(self.time_ratio, self.flops_ratio)

    @property
    def verdict(self) -> str:
        return verdict(self.time_ratio - self.spread, self.time_ratio + self.spread)

    def to_data(self) -> dict[str, Any]:
        derived = {"time_ratio": self.time_ratio, "flops_ratio": self.flops_ratio, "quotient": self.quotient, "verdict": self.verdict}
        return asdict(self) | derived


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """Result of ``benchmark``.

    Attributes:
        rows: one a runtime and batch size.
        layers: one a runtime and layer that differs, where they were asked for.
        macs_before: of one forward pass of the first network on the example inputs; None where nothing counts them.
        macs_after: of the second.
        threads: of both networks.
        dtype: that they were cast to; None where they stayed as they are.
        memory_format: likewise.
        input_shapes: of the example inputs.
        environment: versions, processor, device.
    """

    rows: tuple[RuntimeResult, ...]
    layers: tuple[LayerResult, ...] = ()
    macs_before: int | None
    macs_after: int | None
    threads: int
    dtype: str | None = None
    memory_format: str | None = None
    input_shapes: tuple[tuple[int, ...], ...]
    environment: dict[str, str]

    @property
    def flops_ratio(self) -> float | None:
        """FLOPs (twice the MACs) before over after."""
        return _ratio(self.macs_before, self.macs_after)

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        lists = {"rows": [row.to_data() for row in self.rows], "layers": [layer.to_data() for layer in self.layers]}
        return {"format": FORMAT, "version": VERSION} | asdict(self) | lists | {"flops_ratio": self.flops_ratio, "confidence": CONFIDENCE}

    def to_json(self) -> str:
        """Deterministic text with format and version."""
        return json.dumps(self.to_data(), indent=1, ensure_ascii=False) + "\n"

    def _repr_html_(self) -> str:
        from surgery.benchmarking.table import benchmark_table
        from surgery.tables import to_html

        return to_html(benchmark_table(self))

    def __str__(self) -> str:
        from surgery.benchmarking.table import benchmark_table
        from surgery.tables import render

        return render(benchmark_table(self))


def verdict(low: float, high: float) -> str:
    """What an interval of time ratios says."""
    return "faster" if low > 1 else "slower" if high < 1 else NO_VERDICT


def quotient(time_ratio: float, flops_ratio: float | None) -> float | None:
    return time_ratio / flops_ratio if flops_ratio else None


def _ratio(before: int | None, after: int | None) -> float | None:
    return before / after if before is not None and after else None
