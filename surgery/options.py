"""What, beside the ranks, decides on a plan: the options of ``decompose`` and of the command line, with their defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from passes.errors import SurgeryTypeError, SurgeryValueError, nearest
from passes.kinds import all_kinds
from surgery.ranks.budget import RUNTIMES

__all__ = ["AUTO", "GUARDS", "Options", "runtime_of"]

GUARDS = ("macs", "latency", "step", "none")
AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What, beside the ranks, decides on a plan. The defaults here are those of the API and the command line.

    Attributes:
        method: kind for layers with a kernel of more than one pixel; the others take SVD. With ``"svd"`` linear layers are cut too. With ``"auto"``
            a rule's Tucker ranks set each layer's MACs, and the kind with the smallest error within them is taken; explicit ranks are Tucker's, and a
            factorization that a rule answers is done as it is.
        include: names or ``"re:..."`` patterns; only these layers are cut. Also the way to name linear layers.
        exclude: names or patterns of layers that are kept.
        guard: ``"macs"``: what a rule cuts must lower parameters and, where the calls are known, MACs; ``"latency"``: it must be measured faster
            than the layer, beyond noise, in eager mode, and under ``"latency:RUNTIME"`` in that runtime; ``"step"``: the same of forward and
            backward in training; ``"none"``: nothing is asked. Under a budget the solver goes on with what is left.
        round_to: ranks of rules are rounded up to a multiple of this, at most to the full rank.
        device: where to compute; each weight's own by default.
        effective_weights: layers whose weight is computed (weight norm, parametrizations, standardisation) are cut by the weight that it amounts
            to now; by default they are kept.
    """

    method: str = "tucker"
    include: Any = None
    exclude: Any = None
    guard: str = "macs"
    round_to: int = 1
    device: torch.device | str | None = None
    effective_weights: bool = False

    def __post_init__(self) -> None:
        methods = [*(kind.name for kind in all_kinds()), AUTO]
        if self.method not in methods:
            raise SurgeryValueError(f"method: {self.method!r} is none of {methods}; {nearest(str(self.method), methods)}")
        if self.guard not in GUARDS and runtime_of(self.guard) not in RUNTIMES:
            raise SurgeryValueError(f'guard: {self.guard!r} is none of {list(GUARDS)}, nor "latency:RUNTIME" with one of {list(RUNTIMES)}')
        if not isinstance(self.round_to, int) or isinstance(self.round_to, bool):
            raise SurgeryTypeError(f"round_to: expected an int, got {self.round_to!r}")
        if self.round_to < 1:
            raise SurgeryValueError(f"round_to: must be at least 1, got {self.round_to}")
        if not isinstance(self.effective_weights, bool):
            raise SurgeryTypeError(f"effective_weights: expected True or False, got {self.effective_weights!r}")
        if self.device is not None:
            _check_device(self.device)


def _check_device(device: Any) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # how torch says that a device does not exist depends on the device
        raise SurgeryValueError(f"device: {device!r} is no device that this torch can compute on ({str(error).splitlines()[0]})") from error
    if torch.device(device).type == "meta":
        raise SurgeryValueError("device: 'meta' holds no numbers; nothing can be computed there")


def runtime_of(guard: Any) -> str | None:
    """The runtime in which a guard has chains measured; None where it measures nothing."""
    if guard == "step":
        return "train"
    name, colon, runtime = guard.partition(":") if isinstance(guard, str) else ("", "", "")
    return None if name != "latency" else runtime if colon else "eager"
