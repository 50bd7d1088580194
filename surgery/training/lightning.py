"""A ``DecompositionSchedule`` as a callback of Lightning."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from passes.errors import MissingExtra, SurgeryTypeError, SurgeryValueError
from surgery.training.schedule import DecompositionSchedule

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise MissingExtra.of("lightning is not installed", "lightning") from error

__all__ = ["DecompositionCallback"]

UNITS = ("epoch", "step")


class DecompositionCallback(Callback):  # type: ignore[misc]
    """Calls ``schedule.step`` at the start of each epoch, or of each batch, with the trainer's optimizers and schedulers.

        trainer = Trainer(callbacks=[DecompositionCallback(DecompositionSchedule(decompose_at=10))])

    The schedule is saved in the trainer's checkpoints. To go on from one, let ``resume`` give the fresh module its chains before ``fit`` loads them.

    Args:
        schedule: when and how.
        part: name of the submodule to decompose; the whole ``LightningModule`` by default.
        unit: what the schedule's positions are: ``"epoch"``, or ``"step"`` of the optimizer.
        also: averaged copies of the part, as for ``schedule.step``.

    Raises:
        MissingExtra: lightning is not installed (when this file is imported).
    """

    def __init__(self, schedule: DecompositionSchedule, *, part: str = "", unit: str = "epoch", also: Any = None) -> None:
        if not isinstance(schedule, DecompositionSchedule):
            raise SurgeryTypeError(f"schedule: expected a DecompositionSchedule, got {type(schedule).__name__}")
        if unit not in UNITS:
            raise SurgeryValueError(f"unit: {unit!r} is none of {list(UNITS)}")
        self.schedule, self.part, self.unit, self.also = schedule, part, unit, also

    def resume(self, checkpoint: str | os.PathLike[str] | Mapping[str, Any], module: LightningModule) -> None:
        """Give a fresh module the chains that it had in a checkpoint, before ``trainer.fit(module, ckpt_path=checkpoint)`` fills them.

        Args:
            checkpoint: the file; or its content, where it holds more than tensors and plain data and was loaded by somebody who trusts it.
            module: fresh, changed in place.

        Raises:
            SurgeryValueError: no schedule was saved in it.
        """
        saved = checkpoint if isinstance(checkpoint, Mapping) else torch.load(checkpoint, map_location="cpu", weights_only=True)
        states = saved.get("callbacks", {})
        if self.state_key not in states:
            raise SurgeryValueError(f"checkpoint: it holds no state of {self.state_key!r}; was it saved with this callback?")
        self.schedule.load_state_dict(states[self.state_key], self._part(module), also=self.also, hooks=False)

    def state_dict(self) -> dict[str, Any]:
        return self.schedule.state_dict()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            raise SurgeryTypeError(
                "trainer: Lightning has wrapped the module for several processes by now; train in one, cut before fit "
                "(surgery.decompose(module, ..., inplace=True)), or call schedule.step in a loop of your own"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.schedule.attach(self._part(pl_module), list(trainer.optimizers))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.unit == "epoch":
            self._step(trainer.current_epoch, trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.unit == "step":
            self._step(trainer.global_step, trainer, pl_module)

    def _step(self, position: int, trainer: Trainer, module: LightningModule) -> None:
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        self.schedule.step(position, self._part(module), list(trainer.optimizers), schedulers, also=self.also)

    def _part(self, module: LightningModule) -> nn.Module:
        try:
            part: nn.Module = module.get_submodule(self.part)
        except AttributeError as error:
            raise SurgeryValueError(f"part: {type(module).__name__} has no submodule {self.part!r} ({error})") from error
        return part
