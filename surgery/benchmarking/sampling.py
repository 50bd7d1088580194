"""Two calls timed in turn, until the median of the ratios of neighbouring samples is known well enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter, sleep

__all__ = ["CONFIDENCE", "LEAST_PAIRS", "Clock", "Comparison", "median_interval", "time_in_turn", "wall_clock"]

CONFIDENCE = 0.99
LEAST_PAIRS = 8  # with fewer no two samples hold the median between them with this confidence
SAMPLE_SECONDS = 0.005  # a sample repeats the network until it takes at least this long
WARM_UP_CALLS = 3
WARM_UP_SECONDS = 0.1
GROWTH = 1.2  # the interval is looked at when there are so many times as many pairs, so that chance is not asked again and again

Call = Callable[[], object]
Clock = Callable[[Call, int], float]
"""Seconds that one call takes, from so many in a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two calls beside each other.

    Attributes:
        before: median seconds of the first.
        after: median seconds of the second.
        ratio: median of first / second over pairs of neighbouring samples.
        low: lower end of its confidence interval.
        high: upper end.
        pairs: how many there are.
        settled: whether the interval became as narrow as was asked.
    """

    before: float
    after: float
    ratio: float
    low: float
    high: float
    pairs: int
    settled: bool

    @property
    def spread(self) -> float:
        """Half the width of the confidence interval."""
        return (self.high - self.low) / 2


def time_in_turn(
    before: Call,
    after: Call,
    *,
    clock: Clock,
    pairs: int | None = None,
    precision: float = 0.01,
    seconds: float = 20.0,
    patience: float = 1.0,
    pause: float = 0.0,
) -> Comparison:
    """Warm both up, then sample before, after, after, before, ..., so that other work on the machine and drifts fall on both alike.

    Args:
        before: called with nothing.
        after: the same.
        clock: times a sample.
        pairs: exactly so many; where None, as many as it takes.
        precision: half the width of the ratio's confidence interval, as a share of the ratio, at which it is enough.
        seconds: no further pair is begun after this long, but at least ``LEAST_PAIRS`` are taken.
        patience: while it is open which of the two is faster, the time is doubled, up to so many times ``seconds``.
        pause: seconds between two samples, in which what the last one left running comes to rest.
    """
    from statistics import median

    calls = (before, after)
    loops = max(_loops(call, clock) for call in calls)
    times: tuple[list[float], list[float]] = ([], [])
    ratios: list[float] = []
    low = high = middle = 0.0
    look_at, began = LEAST_PAIRS, perf_counter()
    settled, limit = False, seconds
    while not settled and len(ratios) != pairs:
        for which in (0, 1) if len(ratios) % 2 == 0 else (1, 0):
            if pause:
                sleep(pause)
            times[which].append(max(clock(calls[which], loops), 1e-12))
        ratios.append(times[0][-1] / times[1][-1])
        late = pairs is None and len(ratios) >= LEAST_PAIRS and perf_counter() - began > limit
        if late or len(ratios) in (look_at, pairs):
            look_at = max(look_at + 1, round(look_at * GROWTH))
            low, middle, high = median_interval(ratios)
            settled = pairs is None and high - low <= 2 * precision * middle
        if late and not (low <= 1 <= high and 2 * limit <= patience * seconds):
            break
        limit *= 2 if late else 1
    narrow = high - low <= 2 * precision * middle
    return Comparison(before=median(times[0]), after=median(times[1]), ratio=middle, low=low, high=high, pairs=len(ratios), settled=narrow)


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median between the two values that hold it with 99 % confidence, whatever the distribution; the extremes where there are too few.

    The k-th smallest of n lies above the median if fewer than k do not: with probability P(Binomial(n, 1/2) < k) (David and Nagaraja, Order
    Statistics, 7.1).
    """
    from statistics import median

    import numpy as np
    from scipy.special import bdtr

    ordered, n = sorted(values), len(values)
    rank = int((bdtr(np.arange(n // 2), n, 0.5) <= (1 - CONFIDENCE) / 2).sum())
    outermost = max(rank, 1) - 1
    return ordered[outermost], median(ordered), ordered[n - 1 - outermost]


def wall_clock(call: Call, loops: int) -> float:
    began = perf_counter()
    for _ in range(loops):
        call()
    return (perf_counter() - began) / loops


def _loops(call: Call, clock: Clock) -> int:
    began = perf_counter()
    calls = 0
    while calls < WARM_UP_CALLS or perf_counter() - began < WARM_UP_SECONDS:
        call()
        calls += 1
    return max(1, round(SAMPLE_SECONDS / max(clock(call, 1), 1e-9)))
