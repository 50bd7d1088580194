"""A ``DecompositionSchedule`` as a callback of the Trainer of Hugging Face transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from passes.errors import MissingExtra, SurgeryTypeError, SurgeryValueError
from surgery.files import write_atomically
from surgery.record import unwrap
from surgery.training.schedule import DecompositionSchedule, check_callback, standing

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingExtra.of("transformers is not installed", "transformers") from error

__all__ = ["DecompositionCallback"]

FILE = "surgery_schedule.json"


class DecompositionCallback(TrainerCallback):  # type: ignore[misc]
    """Calls ``schedule.step`` at the start of each epoch, or of each step, with the trainer's model, optimizer and scheduler.

        Trainer(model, args, callbacks=[DecompositionCallback(DecompositionSchedule(decompose_at=1))])

    Beside each of the trainer's checkpoints stands the schedule, in ``surgery_schedule.json``. To go on from one, let ``resume`` give the fresh
    model its chains before ``trainer.train(resume_from_checkpoint=folder)`` loads them. With ``load_best_model_at_end`` the best is that of the
    checkpoints since the last surgery.

    Args:
        schedule: when and how.
        unit: what the schedule's positions are: ``"epoch"``, or ``"step"`` of the optimizer.
        also: averaged copies of the model, as for ``schedule.step``.

    Raises:
        MissingExtra: transformers is not installed (when this file is imported).
    """

    def __init__(self, schedule: DecompositionSchedule, *, unit: str = "epoch", also: Any = None) -> None:
        check_callback(schedule, unit)
        self.schedule, self.unit, self.also = schedule, unit, also

    def resume(self, folder: str | os.PathLike[str], model: nn.Module) -> None:
        """Give a fresh model the chains that it had in a checkpoint folder.

        Raises:
            SurgeryValueError: the folder's schedule is damaged, or does not fit the model.
            OSError: there is none.
        """
        file = Path(folder) / FILE
        try:
            state = json.loads(file.read_bytes())
        except ValueError as error:
            raise SurgeryValueError(f"{file}: not JSON ({error})") from error
        self.schedule.load_state_dict(state, model, also=self.also, hooks=False)

    def on_train_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        if args.world_size > 1:
            raise SurgeryTypeError(
                "trainer: it has wrapped the model for several processes by now; train in one, cut before training "
                "(surgery.decompose(model, ..., inplace=True)), or call schedule.step in a loop of your own"
            )
        self.schedule.attach(unwrap(known["model"]), known["optimizer"])

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        if self.unit == "epoch":
            self._step(int(state.epoch + 1e-6), state, **known)  # a share of an epoch where training goes on from the middle of one

    def on_step_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        if self.unit == "step":
            self._step(state.global_step, state, **known)

    def on_save(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            write_atomically(folder / FILE, (json.dumps(self.schedule.state_dict()) + "\n").encode())

    def _step(self, position: int, state: Any, **known: Any) -> None:
        before = standing(self.schedule)
        self.schedule.step(position, known["model"], known["optimizer"], known.get("lr_scheduler"), also=self.also)
        if standing(self.schedule) != before:
            # checkpoints from before hold another architecture, of which the best could not be loaded at the end
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
