"""How a network is trained and how it is cut: everything that a run depends on, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from surgery import DecompositionSchedule, SurgeryValueError
from surgery.zoo import BUNDLED, make
from training.data import Pictures
from training.scenario import Scenario

__all__ = ["Recipe", "fresh_network"]

OF_THE_CUT = ("ranks", "method", "guard", "round_to", "decay", "balanced", "chain_rate", "warm_up", "batch_norm", "calibration")
FINE_TUNING = (0.1, 0.01)  # of the first rate, in the two halves


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Plain SGD with a learning rate that drops twice, and the options of the cut.

    Attributes:
        network: as ``surgery.zoo.make`` takes it; always with random weights.
        epochs: of the original's run.
        batch: pictures a step.
        rate: of learning, at first.
        drops: shares of the run after each of which it is a tenth of what it was.
        momentum: of SGD.
        weight_decay: of SGD, on all parameters.
        seed: of the weights, of the order of the pictures and of their crops.
        subset: so many training pictures, the first; all where None.
        device: to train on.
        bf16: forward passes in bfloat16 by autocast; guards and budgets of the cut still time float32.
        compiled: ``torch.compile`` of whatever network is trained at the moment.
        channels_last: memory format of weights and pictures.
        ranks: as for ``surgery.decompose``; a list of two where a scenario cuts twice (one that cuts once takes the last).
        method: as for ``surgery.DecompositionSchedule``, and so ``guard`` (None is its default, the measured training step), ``round_to``, ``decay``,
            ``balanced`` and ``warm_up``.
        chain_rate: of the learning rate, for factors: what ``DecompositionSchedule`` calls ``rate``.
        batch_norm: batches over which statistics are taken anew after the cut; 0 leaves them as they are.
        calibration: batches for factors that fit what the layers see; 0 for the weights alone.
    """

    network: str
    epochs: int
    batch: int = 128
    rate: float = 0.1
    drops: tuple[float, ...] = (0.5, 0.75)
    momentum: float = 0.9
    weight_decay: float = 1e-4
    seed: int = 0
    subset: int | None = None
    device: str = "cpu"
    bf16: bool = False
    compiled: bool = False
    channels_last: bool = True
    ranks: Any = "evbmf"
    method: str = "tucker"
    guard: str | None = None
    round_to: int = 8
    decay: str = "product"
    balanced: bool = True
    chain_rate: float | str = "auto"
    warm_up: int = 0
    batch_norm: int = 0
    calibration: int = 0

    def facts(self, scenario: Scenario) -> dict[str, Any]:
        """What a run of this scenario depends on: without a cut not on how it would be made."""
        cuts = scenario != Scenario()
        return {name: _plain(value) for name, value in asdict(self).items() if cuts or name not in OF_THE_CUT}

    def rate_at(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0."""
        if epoch >= self.epochs:
            raise SurgeryValueError(f"epoch {epoch}: the run is over after {self.epochs}")
        return self.rate * 0.1 ** sum(epoch >= share * self.epochs for share in self.drops)

    def rate_of(self, scenario: Scenario, epoch: int) -> float:
        """Likewise, with the epochs of fine-tuning after the last."""
        if epoch < self.epochs:
            return self.rate_at(epoch)
        second = 2 * (epoch - self.epochs) >= (scenario.fine_tune or 0)
        return self.rate * FINE_TUNING[second]

    def schedule(self, scenario: Scenario, pictures: Pictures) -> DecompositionSchedule | None:
        """What cuts the network, and fuses it back, in the course of a run; None for the original."""
        cuts = scenario.cuts_at(self.epochs)
        if not cuts:
            return None
        return DecompositionSchedule(
            cuts,
            scenario.reconstruct_at,
            self.ranks[-len(cuts) :] if isinstance(self.ranks, list) else self.ranks,
            method=self.method,
            guard=self.guard,
            round_to=self.round_to,
            example_inputs=self.formatted(pictures.sample(1)[0]),
            calibration=self._batches(pictures, self.calibration),
            batch_norm=self._batches(pictures, self.batch_norm),
            warm_up=self.warm_up,
            balanced=self.balanced,
            rate=self.chain_rate,
            decay=self.decay,
        )

    def _batches(self, pictures: Pictures, count: int) -> Any:
        return (lambda: [self.formatted(x) for x in pictures.sample(count)]) if count else None

    def formatted(self, x: torch.Tensor) -> torch.Tensor:
        """Pictures in the memory format that is trained in."""
        return x.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)


def fresh_network(recipe: Recipe) -> nn.Module:
    """The recipe's network with random weights of its seed, on its device, in its memory format."""
    torch.manual_seed(recipe.seed)
    registry, _, name = recipe.network.partition(":")
    model = BUNDLED[name][0]() if registry == "surgery" and name in BUNDLED else make(recipe.network)[0]
    return model.to(recipe.device, memory_format=torch.channels_last if recipe.channels_last else torch.preserve_format)


def _plain(value: Any) -> Any:
    """For JSON: a rule of the user's own by its name."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return f"{value.__module__}:{getattr(value, '__qualname__', type(value).__qualname__)}" if callable(value) else value
