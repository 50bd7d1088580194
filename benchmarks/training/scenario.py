"""What is done to a network in the course of a run, as Elhoushi et al. 2019 compare it: nothing, a cut, a cut and back, or a cut after training.

Beyond the paper a network may be cut again, deeper, later in the run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from surgery import SurgeryValueError

__all__ = ["Scenario", "branch_points", "usual"]

FORMS = "original, decompose-N, with -deeper-L, -reconstruct-M or both after it, after-F (F epochs of fine-tuning after the last)"
PATTERN = re.compile(r"original|decompose-(?P<cut>\d+)(-deeper-(?P<deeper>\d+))?(-reconstruct-(?P<back>\d+))?|after-(?P<tune>\d+)")
PAPER: Mapping[str, tuple[str, ...]] = {
    "surgery:vgg19": ("original", *(f"decompose-{n}" for n in (10, 20, 30, 40, 50)), "decompose-10-reconstruct-190", "after-40"),
    "surgery:resnet56": ("original", *(f"decompose-{n}" for n in (10, 20, 30, 40, 50)), "decompose-10-reconstruct-190", "after-40"),
    "surgery:densenet40": ("original", "decompose-20", "decompose-20-reconstruct-150", "after-40"),
    "torchvision:resnet50": ("original", "decompose-30", "after-20"),
}


@dataclass(frozen=True, slots=True)
class Scenario:
    """One of them. Positions are in epochs done before; all None is the original."""

    decompose_at: int | None = None
    deeper_at: int | None = None
    reconstruct_at: int | None = None
    fine_tune: int | None = None

    @classmethod
    def parse(cls, text: str) -> Scenario:
        """From its name.

        Raises:
            SurgeryValueError: it is none of them.
        """
        found = PATTERN.fullmatch(text)
        if found is None:
            raise SurgeryValueError(f"scenario {text!r}: expected one of {FORMS}")
        cut, deeper, back, tune = (None if found[name] is None else int(found[name]) for name in ("cut", "deeper", "back", "tune"))
        if cut is not None and deeper is not None and deeper <= cut:
            raise SurgeryValueError(f"scenario {text!r}: it must be cut deeper after it was decomposed")
        if tune == 0:
            raise SurgeryValueError(f"scenario {text!r}: at least one epoch of fine-tuning is needed")
        last = cut if deeper is None else deeper
        if last is not None and back is not None and back <= last:
            raise SurgeryValueError(f"scenario {text!r}: it must be reconstructed after it was decomposed")
        return cls(cut, deeper, back, tune)

    def __str__(self) -> str:
        if self.fine_tune is not None:
            return f"after-{self.fine_tune}"
        if self.decompose_at is None:
            return "original"
        later = {"deeper": self.deeper_at, "reconstruct": self.reconstruct_at}
        return "-".join([f"decompose-{self.decompose_at}", *(f"{what}-{at}" for what, at in later.items() if at is not None)])

    def check(self, epochs: int) -> None:
        """Raise ``SurgeryValueError`` where a run of so many epochs ends before all of it is done."""
        last = self._last
        if last >= epochs:
            raise SurgeryValueError(f"scenario {self}: a run of {epochs} epochs is over before epoch {last} begins")

    @property
    def _last(self) -> int:
        """Where the last surgery of the original's epochs is done."""
        return max(self.decompose_at or 0, self.deeper_at or 0, self.reconstruct_at or 0)

    def length(self, epochs: int) -> int:
        """Epochs of the whole run."""
        return epochs + (self.fine_tune or 0)

    def cuts_at(self, epochs: int) -> tuple[int, ...]:
        """Epochs before each cut."""
        return tuple(at for at in (epochs if self.fine_tune is not None else self.decompose_at, self.deeper_at) if at is not None)

    def branch(self, epochs: int) -> tuple[Scenario, int] | None:
        """The scenario that this one is the same as for its first epochs, and how many these are."""
        if self.reconstruct_at is not None:
            return Scenario(self.decompose_at, self.deeper_at), self.reconstruct_at
        cuts = self.cuts_at(epochs)
        return (Scenario(), cuts[0]) if cuts else None


def branch_points(scenarios: Iterable[Scenario], epochs: int) -> dict[Scenario, set[int]]:
    """After which epochs of which scenarios others go on from there."""
    found: dict[Scenario, set[int]] = {}
    for scenario in scenarios:
        branch = scenario.branch(epochs)
        if branch is not None:
            found.setdefault(branch[0], set()).add(branch[1])
    return found


def usual(network: str, epochs: int) -> tuple[str, ...]:
    """The paper's scenarios of a network; for others, and for shorter runs, its first ones at the same shares of the run, where there is room."""
    paper = PAPER.get(network)
    if paper is not None and all(_fits(Scenario.parse(name), epochs) for name in paper):
        return paper
    cut = max(round(epochs * 0.05), 1)
    back = min(max(round(epochs * 0.95), cut + 1), epochs - 1)
    found = [
        Scenario(),
        Scenario(cut),
        *([Scenario(cut, reconstruct_at=back)] if back > cut else ()),
        Scenario(fine_tune=max(round(epochs * 0.2), 1)),
    ]
    return tuple(str(scenario) for scenario in found if _fits(scenario, epochs))


def _fits(scenario: Scenario, epochs: int) -> bool:
    return scenario._last < epochs
