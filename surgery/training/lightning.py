"""A ``DecompositionSchedule`` as a callback of Lightning."""

from __future__ import annotations

import os
from collections.abc import Mapping
from math import inf
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from passes.errors import MissingExtra, SurgeryTypeError, SurgeryValueError
from surgery.training.schedule import DecompositionSchedule, check_callback, standing

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
except ImportError as error:
    raise MissingExtra.of("lightning is not installed", "lightning") from error

__all__ = ["DecompositionCallback"]


class DecompositionCallback(Callback):  # type: ignore[misc]
    """Calls ``schedule.step`` at the start of each epoch, or of each batch, with the trainer's optimizers and schedulers.

        trainer = Trainer(callbacks=[DecompositionCallback(DecompositionSchedule(decompose_at=10))])

    The schedule is saved in the trainer's checkpoints. To go on from one, let ``resume`` give the fresh module its chains before ``fit`` loads them.
    The best of checkpoints that are kept by a metric is that of those since the last surgery, and ``EarlyStopping`` counts anew.

    Args:
        schedule: when and how.
        part: name of the submodule to decompose; the whole ``LightningModule`` by default.
        unit: what the schedule's positions are: ``"epoch"``, or ``"step"`` of the optimizer.
        also: averaged copies of the part, as for ``schedule.step``.

    Raises:
        MissingExtra: lightning is not installed (when this file is imported).
    """

    def __init__(self, schedule: DecompositionSchedule, *, part: str = "", unit: str = "epoch", also: Any = None) -> None:
        check_callback(schedule, unit)
        self.schedule, self.part, self.unit, self.also = schedule, part, unit, also

    @property
    def state_key(self) -> str:
        """Callbacks of several parts are told apart."""
        key: str = self._generate_state_key(part=self.part) if self.part else type(self).__qualname__
        return key

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
        key = next((key for key in (self.state_key, type(self).__qualname__) if key in states), None)  # the second where it had no part
        if key is None:
            raise SurgeryValueError(f"checkpoint: it holds no state of {self.state_key!r}; was it saved with this callback?")
        self.schedule.load_state_dict(states[key], self._part(module), also=self.also, hooks=False)

    def state_dict(self) -> dict[str, Any]:
        return self.schedule.state_dict()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1 or isinstance(trainer.strategy.model, DistributedDataParallel):
            raise SurgeryTypeError(
                "trainer: Lightning has wrapped the module for several processes by now; train in one without such a strategy, cut before fit "
                "(surgery.decompose(module, ..., inplace=True)), or call schedule.step in a loop of your own"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.schedule.attach(self._part(pl_module), self._optimizers(trainer, pl_module))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.unit == "epoch":
            self._step(trainer.current_epoch, trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.unit == "step":
            self._step(trainer.global_step, trainer, pl_module)

    def _step(self, position: int, trainer: Trainer, module: LightningModule) -> None:
        optimizers = self._optimizers(trainer, module)
        schedulers = [c.scheduler for c in trainer.lr_scheduler_configs if any(getattr(c.scheduler, "optimizer", o) is o for o in optimizers)]
        before = standing(self.schedule)
        self.schedule.step(position, self._part(module), optimizers, schedulers, also=self.also)
        if standing(self.schedule) != before:
            for each in (*trainer.checkpoint_callbacks, *trainer.early_stopping_callbacks):
                _forget_the_best(each)

    def _optimizers(self, trainer: Trainer, module: LightningModule) -> list[Any]:
        """Those that train the part: others have nothing to do with its surgery."""
        mine = {id(p) for p in self._part(module).parameters()}
        every = list(trainer.optimizers)
        return [each for each in every if any(id(p) in mine for group in each.param_groups for p in group["params"])] or every

    def _part(self, module: LightningModule) -> nn.Module:
        try:
            part: nn.Module = module.get_submodule(self.part)
        except AttributeError as error:
            raise SurgeryValueError(f"part: {type(module).__name__} has no submodule {self.part!r} ({error})") from error
        return part


def _forget_the_best(callback: Any) -> None:
    """Checkpoints from before hold another architecture, of which the best could not be loaded at the end; their files stay. Nor is a network to be
    stopped for what it was before its cut.
    """
    if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
        callback.best_k_models.clear()
        callback.kth_best_model_path = callback.best_model_path = ""
        callback.best_model_score = None
    if isinstance(callback, EarlyStopping):
        callback.wait_count = 0
        callback.best_score = torch.tensor(-inf if callback.mode == "max" else inf)
