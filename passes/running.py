"""Running a model without changing it: private copies, quiet runs, and what happens around each call of a module.

Nothing here changes the caller's model or inputs, nor any random state: every run happens on a copy, and generators are put back.
"""

from __future__ import annotations

import copy
import functools
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from passes.chain import Chain
from passes.errors import SurgeryError, SurgeryTypeError, SurgeryValueError
from passes.parity import private_inputs, tensors_in
from passes.site import is_layer

__all__ = ["arguments", "kept_random_states", "model_errors", "private_copy", "quiet_run", "run", "tensor_metadata", "watch"]


def private_copy(model: nn.Module, *, share_parameters: bool = False) -> nn.Module:
    """A deep copy that can be worked on; with ``share_parameters`` the parameters (never the buffers) are the caller's own.

    Tensors that are attributes and results of a computation (old-style ``weight_norm``) are copied detached.

    Raises:
        SurgeryTypeError: the model holds something that cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in (*vars(module).values(), *module._buffers.values()):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    if share_parameters:
        memo |= {id(parameter): parameter for parameter in model.parameters()}
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, AttributeError, ValueError) as error:
        raise SurgeryTypeError(f"the model ({type(model).__name__}) cannot be copied ({error}); give a model that copy.deepcopy accepts") from error


def run(model: nn.Module, example_inputs: Any) -> Any:
    """The model's output: a tuple is its positional arguments, a mapping its keyword arguments, anything else its one argument.

    Raises:
        SurgeryValueError: the model does not accept these inputs; the model's own error is the cause.
    """
    args, kwargs = arguments(private_inputs(example_inputs))
    with model_errors(model, example_inputs):
        return model(*args, **kwargs)


def arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments, by the convention that ``run`` states."""
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (example_inputs,), {}


@contextmanager
def model_errors(model: nn.Module, example_inputs: Any) -> Iterator[None]:
    """Whatever the model's own code raises on these inputs becomes one error that says so."""
    try:
        yield
    except SurgeryError:
        raise
    except Exception as error:  # the model's own code runs here: it may raise anything
        shapes = ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}" for t in tensors_in(example_inputs))
        raise SurgeryValueError(
            f"example_inputs: {type(model).__name__} fails on them ({shapes or repr(example_inputs)}): {type(error).__name__}: {error}"
        ) from error


@contextmanager
def kept_random_states() -> Iterator[None]:
    """The random states afterwards as they were: torch's, Python's, and numpy's where it is loaded."""
    numpy, state = sys.modules.get("numpy"), random.getstate()
    numpy_state = None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


@contextmanager
def quiet_run() -> Iterator[None]:
    """No gradients, and the random states afterwards as they were."""
    with kept_random_states(), torch.no_grad():
        yield


Enter = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
Leave = Callable[[nn.Module, Any, bool], Any]


def watch(module: nn.Module, enter: Enter, leave: Leave) -> None:
    """Have every call of a module of a private copy announced, around everything that its own hooks do.

    ``enter(module, args, kwargs)`` comes first; ``leave(module, output, returned)`` last, with ``returned`` False where the call raises; what it
    returns, unless that is None, is the output. The ``forward`` of a layer or chain, called by itself, is a call too.
    """
    raised_before: list[BaseException | None] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raised_before.append(sys.exception())
        enter(module, args, kwargs)

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return leave(module, output, sys.exception() is raised_before.pop())

    # by the base class: TorchScript modules run such hooks, but refuse to register them
    nn.Module.register_forward_pre_hook(module, before, prepend=True, with_kwargs=True)
    nn.Module.register_forward_hook(module, after, with_kwargs=True, always_call=True)
    if is_layer(module) or isinstance(module, Chain):
        forward = module.forward

        @functools.wraps(forward)
        def announced(*args: Any, **kwargs: Any) -> Any:
            if raised_before:  # the call is announced already
                return forward(*args, **kwargs)
            before(module, args, kwargs)
            output = None
            try:
                output = forward(*args, **kwargs)
            finally:
                changed = after(module, args, kwargs, output)
            return output if changed is None else changed

        module.forward = announced


def tensor_metadata(tensor: Tensor) -> Any:
    """What a node's ``meta["tensor_meta"]`` says of a tensor."""
    from torch.fx.passes.shape_prop import TensorMetadata

    stride = tensor.stride() if tensor.layout == torch.strided else ()
    return TensorMetadata(tensor.shape, tensor.dtype, tensor.requires_grad, stride, None, False, {})
