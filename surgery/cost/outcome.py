"""What came of a latency budget, as it is recorded and told."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LatencyOutcome"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyOutcome:
    """What came of a latency budget. Shares are of the original network's time.

    Attributes:
        runtime: and its version.
        asked: the budget.
        predicted: by the times of the chains; None for a plan that was not chosen by them.
        measured: the whole network against the original, in turn; None with a profile from another device.
        low: lower end of its 99 % confidence interval.
        high: the upper end.
        replans: corrections that were made.
        batch: of the example inputs.
        threads: in use.
        kept: nothing was cut, for the reason in ``note``.
        note: what else there is to say.
    """

    runtime: str
    asked: float
    predicted: float | None
    measured: float | None
    low: float | None
    high: float | None
    replans: int
    batch: int
    threads: int
    kept: bool = False
    note: str | None = None

    def __str__(self) -> str:
        where = f"in {self.runtime}, batch {self.batch}, {self.threads} thread{'s' if self.threads > 1 else ''}"
        if self.kept:
            return f"latency: nothing was cut: {self.note}; {where}, asked for {self.asked:.2f}"
        predicted = "" if self.predicted is None else f"{self.predicted:.2f}"
        asked = f"asked for {self.asked:.2f}" + (f", predicted {predicted}" if predicted else "")
        if self.measured is None:
            text = f"{predicted} of the original's time by the profile, not measured here, {where} (asked for {self.asked:.2f})"
        else:
            spread = "" if self.low is None or self.high is None else f" ({self.low:.2f} to {self.high:.2f})"
            again = f", {self.replans} replan{'s' if self.replans > 1 else ''}" if self.replans else ""
            text = f"{self.measured:.2f}{spread} of the original's time measured {where}; {asked}{again}"
        return f"latency: {text}" + (f"; {self.note}" if self.note else "")
