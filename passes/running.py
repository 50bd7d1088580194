"""Running a model without changing it: private copies, quiet runs, and what happens around each call of a module.

Nothing here changes the caller's model or inputs, nor any random state: every run happens on a copy, and generators are put back.
"""

from __future__ import annotations

import copy
import functools
import random
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from passes.chain import HOOKS, Chain, has_hooks
from passes.errors import SurgeryError, SurgeryTypeError, SurgeryValueError
from passes.parity import TOLERANCE_EVAL, private_inputs, tensors_in
from passes.shared_state import modules_not_copied
from passes.site import is_layer, named_groups

__all__ = [
    "arguments",
    "callable_of",
    "callers_code",
    "check_initialized",
    "evaluating_copy",
    "first_line",
    "is_out_of_memory",
    "kept_random_states",
    "model_errors",
    "output_of",
    "outputs_in_a_row",
    "private_copy",
    "proof_runs",
    "quiet_run",
    "quietly",
    "random_state",
    "run",
    "seed_all",
    "shorten",
    "tensor_metadata",
    "uncompiled",
    "watch",
    "without_waiting",
]

T = TypeVar("T")

LONGEST = 400  # characters of somebody else's error in ours
SEEDS = (20, 31)  # one a run of a proof


def private_copy(model: nn.Module, *, share_parameters: bool = False) -> nn.Module:
    """A deep copy that can be worked on; with ``share_parameters`` the parameters (never the buffers) are the caller's own.

    Tensors that are attributes and results of a computation (old-style ``weight_norm``) are copied detached.

    Raises:
        SurgeryTypeError: the model holds something that cannot be copied, or a function or weak reference that reaches a module of the model by
            itself: a copy would go on using that one.
    """
    for name, attribute, held, remedy in modules_not_copied(model):
        what = "one of its hooks" if attribute in HOOKS else f"its attribute {attribute!r}"
        raise SurgeryTypeError(f"{name or 'the model'}: {what} {held}, and in a copy would go on using the caller's own; {remedy}")
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


def evaluating_copy(model: nn.Module, *, share_parameters: bool = False) -> nn.Module:
    """A private copy in eval mode. (``eval()`` gives what a class's own ``train`` gives, which may be nothing.)"""
    twin = private_copy(model, share_parameters=share_parameters)
    twin.eval()
    return twin


def run(model: nn.Module, example_inputs: Any, argument: str = "example_inputs") -> Any:
    """The model's output: a tuple is its positional arguments, a mapping its keyword arguments, anything else its one argument.

    Raises:
        SurgeryValueError: the model does not accept these inputs; the model's own error is the cause.
    """
    args, kwargs = arguments(private_inputs(example_inputs))
    with model_errors(model, example_inputs, argument):
        return callable_of(model)(*args, **kwargs)


def callable_of(model: nn.Module) -> Callable[..., Any]:
    """What to call for a call of the model: the ``forward`` of a graph module without hooks, since its ``__call__`` prints what goes wrong."""
    return model.forward if isinstance(model, fx.GraphModule) and not has_hooks(model) else model


def output_of(model: nn.Module, example_inputs: Any, *, gradients: bool = False, argument: str = "example_inputs") -> Any:
    """The output of a private copy, always with the same random numbers, and with gradients only where the model is known to need them."""
    with kept_random_states(), torch.set_grad_enabled(gradients), uncompiled():
        seed_all(SEEDS[0])
        twin = private_copy(model)
        with without_waiting(twin):
            return run(twin, example_inputs, argument)


def outputs_in_a_row(model: nn.Module, several: Sequence[Any]) -> list[list[Tensor]]:
    """All tensors of each output, where one private copy is called with several inputs one after the other, each call under a seed of its own.

    A second call tells what the first left behind: whether a model that counts, caches or collects is the same as what stands for it.

    Raises:
        SurgeryTypeError: the model cannot be copied.
        SurgeryValueError: it does not accept some of the inputs.
    """

    def attempt() -> list[list[Tensor]]:
        twin, outputs = private_copy(model), []
        for inputs, seed in zip(several, SEEDS, strict=True):
            seed_all(seed)
            outputs.append([t.detach().clone() for t in tensors_in(run(twin, inputs))])
        return outputs

    return quietly(attempt)


def proof_runs(model: nn.Module, example_inputs: Any) -> tuple[Sequence[Any], list[list[Tensor]]]:
    """Two inputs that the model accepts one after the other, and what it gives for them: the example, and other numbers of the same shapes.

    Where the model refuses other numbers the second input is the example once more.

    Raises:
        SurgeryTypeError: the model cannot be copied.
        SurgeryValueError: it does not accept the example inputs.
    """
    other = (example_inputs, _other_numbers(example_inputs))
    try:
        return other, outputs_in_a_row(model, other)
    except SurgeryValueError:
        same = (example_inputs, example_inputs)
        return same, outputs_in_a_row(model, same)


def _other_numbers(example_inputs: Any) -> Any:
    """Inputs of the same structure with other floats, within the range between the example's own and zero."""
    memo: dict[int, Any] = {}
    for tensor in tensors_in(example_inputs):
        if tensor.dtype in TOLERANCE_EVAL and tensor.layout == torch.strided and not tensor.is_nested:
            changed = 0.75 * tensor.detach().flatten().flip(0).reshape(tensor.shape)
            memo[id(tensor)] = changed.to(tensor.dtype).requires_grad_(tensor.requires_grad and tensor.is_leaf)
    return private_inputs(example_inputs, memo)


def arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments, by the convention that ``run`` states."""
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (example_inputs,), {}


@contextmanager
def model_errors(model: nn.Module, example_inputs: Any, argument: str = "example_inputs") -> Iterator[None]:
    """Whatever the model's own code raises on these inputs becomes one error that says so, and which argument they were."""
    try:
        yield
    except SurgeryError:
        raise
    except Exception as error:  # the model's own code runs here: it may raise anything
        shapes = ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}" for t in tensors_in(example_inputs))
        given = shapes or f"no tensor but {type(example_inputs).__name__}"
        raise SurgeryValueError(f"{argument}: {type(model).__name__} fails on them ({given}): {first_line(error)}") from error


def shorten(text: str) -> str:
    """The beginning of it: torch's errors may hold whole graphs."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]} ..."


@contextmanager
def callers_code(what: str) -> Iterator[None]:
    """Whatever code that the caller gave raises becomes one error that says so. Errors of the file system pass through.

    Raises:
        SurgeryError: it failed; its own error is the cause.
    """
    try:
        yield
    except (SurgeryError, OSError):
        raise
    except Exception as error:  # code of others: it may raise anything
        raise SurgeryError(f"{what}: {first_line(error)}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or the one that it came from, says that there is too little memory, on a GPU or elsewhere."""
    return any(isinstance(each, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(each) for each in (error, error.__cause__))


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of its text: below it torch lists all overloads of a function."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line.removesuffix(', but expected one of:')}"


def check_initialized(model: nn.Module) -> None:
    """Refuse a model that does not yet know the shapes of its parameters.

    Raises:
        SurgeryValueError: a lazy module was never run.
    """
    for module, names in named_groups(model):
        if any(is_lazy(t) for t in (*module._parameters.values(), *module._buffers.values()) if t is not None):
            raise SurgeryValueError(f"{names[0] or 'the model'}: {type(module).__name__} has no shape yet; run the model once, then come back")


@contextmanager
def without_waiting(model: nn.Module) -> Iterator[None]:
    """Batch norms that wait for other processes (``SyncBatchNorm``) go by their own batch inside: one process runs the model alone."""
    norms = [m for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]
    waiting = [m for m in norms if type(m).forward is nn.SyncBatchNorm.forward and "forward" not in m.__dict__]
    for module in waiting:
        module.__dict__["forward"] = types.MethodType(_BatchNorm.forward, module)
    try:
        yield
    finally:
        for module in waiting:
            module.__dict__.pop("forward", None)


@contextmanager
def kept_random_states() -> Iterator[None]:
    """The random states afterwards as they were: torch's, Python's, and numpy's where it is loaded. CUDA is not begun for it."""
    numpy, state = sys.modules.get("numpy"), random.getstate()
    devices = None  # those of whatever accelerator there is
    if torch.cuda.is_available():  # named, or torch warns where there are several
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    numpy_state = None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


@contextmanager
def uncompiled() -> Iterator[None]:
    """What is compiled runs as it was written: under modes that look on torch compiles nothing, and refuses where ``fullgraph`` was asked for."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def quiet_run() -> Iterator[None]:
    """No gradients, and the random states afterwards as they were."""
    with kept_random_states(), torch.no_grad():
        yield


def seed_all(seed: int) -> None:
    """Seed torch, Python, and numpy where it is loaded; to be used inside of ``kept_random_states``."""
    if torch.cuda.is_available() and not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.default_generator.manual_seed(seed)  # a seed for CUDA would wait until it is begun, long after
    else:
        torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def random_state() -> tuple[Any, ...]:
    """Equal before and after whatever draws no random numbers."""
    numpy = sys.modules.get("numpy")
    kind, keys, *rest = ("", None) if numpy is None else numpy.random.get_state()
    begun = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if begun else ())]
    return [bytes(state.numpy()) for state in states], random.getstate(), kind, None if keys is None else keys.tobytes(), *rest


def quietly(attempt: Callable[[], T]) -> T:
    """What ``attempt``, which runs a model on a private copy of its own, gives in a quiet run.

    Where the model fails so, it is tried once more with gradients: some differentiate by their inputs (forces from an energy).

    Raises:
        SurgeryValueError: the model fails either way; the error is that of the run without gradients.
    """
    try:
        with quiet_run(), uncompiled():
            return attempt()
    except SurgeryValueError:
        try:
            with kept_random_states(), torch.enable_grad(), uncompiled():
                return attempt()
        except SurgeryValueError:
            pass
        raise


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
