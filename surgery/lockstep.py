"""Forward passes that stop on the way, so that the weights of what is still to come can be changed under all of them.

A pass runs in a thread of its own, and only while the caller waits for it: nothing ever runs at the same time. Whatever the code of a network is, its
frame waits where it was stopped, and holds what the rest of the pass needs and nothing else.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from passes.parity import private_inputs, tensors_in
from passes.running import arguments, model_errors, private_copy

__all__ = ["Enough", "OutOfStep", "Pass"]


class Enough(BaseException):
    """All that was to be seen of a pass has been seen. No ``Exception``, which a model might catch."""


class OutOfStep(Exception):
    """A pass meets its modules in another order than it is asked for them, or cannot be stopped and held."""


class Pass:
    """A forward pass of one batch, which stops at the first call of each of the named modules; it ends after the last of them.

    Args:
        model: the network. A copy is run that shares its parameters, and so goes on with what they are then; what ``forward`` keeps on its modules
            stays apart from that of other passes.
        names: of the modules.
        batch: as for ``passes.running.run``.
        outputs: stop after the call with what it gives, instead of before it with what it gets.
        argument: what errors of the network call the batch.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], batch: Any, *, outputs: bool, argument: str = "batch") -> None:
        self._argument = argument
        self._ahead = set(names)
        self._at: tuple[str, Tensor | None] | None = None
        self._error: BaseException | None = None
        self._closing = self._ended = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        twin = private_copy(model, share_parameters=True)
        for name in self._ahead:
            if outputs:
                twin.get_submodule(name).register_forward_hook(partial(self._after, name), prepend=True)  # hooks of its own go on with what it gives
            else:
                twin.get_submodule(name).register_forward_pre_hook(partial(self._before, name))
        self._thread = threading.Thread(target=self._run, args=(twin, batch, _contexts(twin)), daemon=True)

    def reach(self, name: str) -> Tensor | None:
        """Go on to the first call of a module: the first tensor that it gives or gets; None where there is none, or the pass ends before.

        Raises:
            OutOfStep: another of the modules comes first, or this one was passed.
            SurgeryValueError: the network fails.
        """
        if self._ended:
            return None
        if self._thread.ident is None:
            try:
                self._thread.start()
            except RuntimeError as error:  # the system gives no more
                raise OutOfStep from error
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error
        at, self._at = self._at, None
        if at is None:
            return None
        if at[0] != name:
            raise OutOfStep
        return at[1]

    def close(self) -> None:
        """End the pass where it is."""
        self._closing = True
        self._go.release()
        if self._thread.ident is not None:
            self._thread.join()
        self._error = None  # whose traceback holds all that the pass held

    def _run(self, model: nn.Module, batch: Any, contexts: Iterable[AbstractContextManager[Any]]) -> None:
        self._go.acquire()
        try:
            with ExitStack() as stack:
                for context in contexts:
                    stack.enter_context(context)
                args, kwargs = arguments(private_inputs(batch))
                if not self._closing:
                    with model_errors(model, batch, self._argument):
                        model(*args, **kwargs)
        except Enough:
            pass
        except BaseException as error:  # it is the caller's
            self._error = error
        finally:
            self._ended = True
            self._stopped.release()

    def _before(self, name: str, _: nn.Module, args: Any) -> None:
        self._stop(name, args)

    def _after(self, name: str, _: nn.Module, args: Any, output: Any) -> None:
        self._stop(name, output)

    def _stop(self, name: str, seen: Any) -> None:
        if name not in self._ahead:
            return
        self._ahead.remove(name)
        self._at = name, next(tensors_in(seen), None)
        self._stopped.release()
        self._go.acquire()
        if self._closing or not self._ahead:
            raise Enough


def _contexts(model: nn.Module) -> list[AbstractContextManager[Any]]:
    """What gives another thread the state that torch keeps for each: autocast, the default device, CUDA's device and stream; and no gradients."""
    kinds = {"cpu", *(t.device.type for t in (*model.parameters(), *model.buffers()))} - {"meta"}
    found: list[AbstractContextManager[Any]] = [torch.no_grad()]
    for kind in sorted(kinds):
        if torch.is_autocast_enabled(kind):
            found.append(torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=torch.is_autocast_cache_enabled()))
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found.append(torch.cuda.stream(torch.cuda.current_stream()))
    return [*found, torch.get_default_device()]
