"""The learning rate warmed up again after a cut, underneath whatever scheduler there is."""

from __future__ import annotations

from typing import Any

from surgery.training.optimizer import as_optimizers

__all__ = ["WarmUp"]


class WarmUp:
    """For so many steps of the optimizers, their rates rise in a straight line from nearly nothing to what their schedulers say.

    Each step is made at rate * (k + 1) / (steps + 1), k = 0, 1, ...; right after it the rate in the group is the scheduler's again, so that no
    scheduler sees any of it.

    Args:
        optimizer: one, or a list of several that step together.
        steps: how many; 0 does nothing.
        done: how many were made already, in a run that goes on.
    """

    def __init__(self, optimizer: Any, steps: int, done: int = 0) -> None:
        self.steps = steps
        self.done = done
        self._handles: list[Any] = []
        self._rates: dict[int, list[Any]] = {}
        self._slowed = optimizers = as_optimizers(optimizer) if self.left else ()
        for each in optimizers:
            self._handles += [each.register_step_pre_hook(self._before), each.register_step_post_hook(self._after)]
        self._last = id(optimizers[-1]) if optimizers else None

    @property
    def left(self) -> int:
        """Steps that are still slowed down."""
        return max(self.steps - self.done, 0)

    def remove(self) -> None:
        """End it now."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for optimizer in self._slowed:
            self._restore(optimizer)

    def _restore(self, optimizer: Any) -> bool:
        """The rates as its scheduler knows them; a step that failed has left them low. Whether they were."""
        rates = self._rates.pop(id(optimizer), ())
        for group, rate in zip(optimizer.param_groups, rates, strict=False):
            group["lr"] = rate
        return bool(rates)

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._restore(optimizer)
        if not self.left:
            return
        self._rates[id(optimizer)] = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * ((self.done + 1) / (self.steps + 1))

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        slowed = self._restore(optimizer)  # not so the second time where a step calls the one of its base class: both run all hooks
        if slowed and id(optimizer) == self._last and self.left:  # the hooks stay: torch is going through them just now
            self.done += 1
