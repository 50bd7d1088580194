"""Surgery in a run of several processes: the first one decides and cuts, the others are sent architecture and numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from passes import host_for
from passes.errors import SurgeryError, SurgeryValueError

if TYPE_CHECKING:
    from surgery.training.followers import Followers

__all__ = ["done_together", "told_by_first"]

T = TypeVar("T")


def told_by_first(ask: Callable[[], T]) -> T:
    """What the first process finds, for all of them; in a run of one process what it finds.

    Raises:
        SurgeryError: in the other processes, where the first one failed; there its own error goes on.
    """
    if not _several():
        return ask()
    import torch.distributed as dist

    told: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            told = [(True, ask())]
        except BaseException as error:
            dist.broadcast_object_list([(False, f"{type(error).__name__}: {error}")], src=0)  # the others are waiting
            raise
    dist.broadcast_object_list(told, src=0)
    well, answer = told[0]
    if not well:
        raise SurgeryError(f"the surgery failed in the first process of this run: {answer}")
    return answer  # type: ignore[no-any-return]


def done_together(
    work: Callable[[], None], facts: Callable[[], Mapping[str, Any]], take: Callable[[Mapping[str, Any], Followers], None], followers: Followers
) -> None:
    """Do surgery once, and have every process end up with the same.

    Args:
        work: does it, in the first process only.
        facts: what was done, to be pickled.
        take: brings the model and all that follows it to these facts, in the other processes; numbers and states of optimizers are sent after that.
        followers: the model with its optimizers and copies.

    Raises:
        SurgeryValueError: they are not as many in all processes.
    """
    if not _several():
        work()
        return
    _check_alike(followers)

    def first() -> Mapping[str, Any]:
        work()
        return facts()

    import torch.distributed as dist

    found = told_by_first(first)
    sent = dist.get_rank() != 0
    before = followers.hold(host_for(followers.model, effective_weights=True).sites()) if sent else {}
    if sent:
        take(found, followers)
    for network in (followers.model, *followers.copies):
        _send_numbers(network)
    for optimizer in followers.optimizers:
        _send_state(optimizer)
    if sent:
        followers.hand_over_gradients(before, host_for(followers.model).sites())


def _check_alike(followers: Followers) -> None:
    """All processes are sent to in turn, so all must have as many tensors to be sent.

    Raises:
        SurgeryValueError: in all of them, where one has other optimizers or copies than the rest.
    """
    import torch.distributed as dist

    mine = len(followers.optimizers), len(followers.copies)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if len(set(everyone)) > 1:
        told = "; ".join(f"process {rank}: {optimizers} and {copies}" for rank, (optimizers, copies) in enumerate(everyone))
        raise SurgeryValueError(f"optimizer and also: every process must give as many optimizers and copies as the others; got {told}")


def _several() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _send_numbers(network: nn.Module) -> None:
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            _send(tensor)


def _send(tensor: Tensor) -> None:
    import torch.distributed as dist

    plain = tensor.detach().contiguous()
    dist.broadcast(plain, src=0)
    if plain.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(plain)


def _send_state(optimizer: Any) -> None:
    """State of every parameter: its outline first, then its tensors."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    outline = told_by_first(lambda: [_outline(optimizer.state[p], p) if p in optimizer.state else None for p in parameters])
    with torch.no_grad():
        for parameter, keys in zip(parameters, outline, strict=True):
            if keys is None:
                optimizer.state.pop(parameter, None)
                continue
            state = optimizer.state.setdefault(parameter, {})
            for key, (value, tensor) in keys.items():
                if tensor is None:
                    state[key] = value.number.to(parameter.device if value.beside else "cpu") if isinstance(value, _Number) else value
                    continue
                shape, dtype = tensor
                if not (isinstance(state.get(key), Tensor) and state[key].shape == shape and state[key].dtype == dtype):
                    like = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
                    state[key] = like if like.shape == shape else like.new_empty(shape)
                _send(state[key])


class _Number(NamedTuple):
    """A tensor of one number, sent from the CPU, and whether it is to lie on the device of its parameter: each process has one of its own."""

    number: Tensor
    beside: bool


def _outline(state: Mapping[str, Any], parameter: Tensor) -> dict[str, tuple[Any, tuple[torch.Size, torch.dtype] | None]]:
    """For each key its value, or shape and number type of a tensor, which is sent on its own."""
    found: dict[str, tuple[Any, tuple[torch.Size, torch.dtype] | None]] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            found[key] = value, None
        elif value.ndim > 0:
            found[key] = None, (value.shape, value.dtype)
        else:
            found[key] = _Number(value.detach().cpu(), value.device == parameter.device), None
    return found
