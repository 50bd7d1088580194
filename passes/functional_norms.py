"""Batch norms that a graph calls as functions become modules, which passes can see and fold."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from passes.neighbours import outer_names

__all__ = ["norms_as_modules"]

CLASSES: dict[int, type[nn.modules.batchnorm._BatchNorm]] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
ARGUMENTS = inspect.signature(functional.batch_norm)
STATE = ("running_mean", "running_var", "weight", "bias")
SIZES = ("ndim", "shape", "dim", "size")


def norms_as_modules(model: fx.GraphModule) -> None:
    """Give a ``GraphModule`` the batch norms that it calls as functions in eval mode as modules, in place; it computes the same.

    Classes that derive from torch's batch norms (with an activation in them, say) are traced to such calls. The tensors move from where the graph
    reads them to a module ``norm`` beside them. Left alone is what reads tensors that something else reads too, or inputs of unknown shape. Checks of
    sizes in the graph (``torch._assert`` on nothing but sizes) are dropped: the inputs that shapes are known of passed them.
    """
    for node in list(model.graph.nodes):
        if node.op == "call_function" and node.target is torch._assert:
            _drop_check(node)
    for node in reversed(model.graph.nodes):
        if _asks_for_size(node) and not node.users:  # for the text of a check
            model.graph.erase_node(node)
    found: dict[tuple[Any, ...], list[fx.Node]] = {}
    for node in model.graph.nodes:
        key = _key(node)
        if key is not None:
            found.setdefault(key, []).append(node)
    for (*targets, eps, dims), nodes in found.items():
        _replace(model, dict(zip(STATE, targets, strict=True)), eps, CLASSES[dims], nodes)
    model.recompile()


def _drop_check(check: fx.Node) -> None:
    """Erase an assertion about sizes, and what only it reads."""
    condition, waiting = check.args[0] if check.args else None, list[fx.Node]()
    todo = [condition] if isinstance(condition, fx.Node) else []
    while todo:
        node = todo.pop()
        waiting.append(node)
        if not _asks_for_size(node):
            if node.op != "call_function" or not _is_arithmetic(node.target):
                return
            todo += [n for n in node.all_input_nodes if n not in waiting]
    check.graph.erase_node(check)
    for node in sorted(waiting, reverse=True):
        if not node.users:
            node.graph.erase_node(node)


def _asks_for_size(node: fx.Node) -> bool:
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in SIZES
    return node.op == "call_method" and node.target in SIZES


def _is_arithmetic(function: Callable[..., Any] | str) -> bool:
    return function is operator.getitem or getattr(operator, getattr(function, "__name__", ""), None) is function


def _key(node: fx.Node) -> tuple[Any, ...] | None:
    """The targets of its tensors, its eps, and dimensions of its input, or None where it is no batch norm that could be a module."""
    if node.op != "call_function" or node.target is not functional.batch_norm:
        return None
    given = ARGUMENTS.bind(*node.args, **node.kwargs)
    given.apply_defaults()
    values = given.arguments
    meta = getattr(values["input"], "meta", {}).get("tensor_meta")
    dims = len(meta.shape) if meta is not None else 0
    tensors = [values[name] for name in STATE]
    read = all(isinstance(t, fx.Node) and t.op == "get_attr" for t in tensors if t is not None)
    complete = tensors[0] is not None and tensors[1] is not None and (tensors[2] is None) == (tensors[3] is None)
    if values["training"] is not False or not isinstance(values["eps"], float) or dims not in CLASSES or not read or not complete:
        return None
    return (*(None if t is None else str(t.target) for t in tensors), values["eps"], dims)


def _replace(
    model: fx.GraphModule, targets: dict[str, str | None], eps: float, kind: type[nn.modules.batchnorm._BatchNorm], nodes: list[fx.Node]
) -> None:
    """One module for these calls, unless its tensors are not its own."""
    named = {name: target for name, target in targets.items() if target is not None}
    readers = [n for n in model.graph.nodes if n.op == "get_attr" and n.target in named.values()]
    tensors = {name: operator.attrgetter(target)(model) for name, target in named.items()}
    others_read = any(user not in nodes for reader in readers for user in reader.users)
    if (
        others_read
        or _others_hold(model, set(named.values()))
        or not all(isinstance(tensors.get(n), nn.Parameter | None) for n in ("weight", "bias"))
    ):
        return
    norm = kind(tensors["running_mean"].numel(), eps=eps, affine="weight" in tensors, device="meta").eval()
    for name, tensor in tensors.items():
        (norm._parameters if name in ("weight", "bias") else norm._buffers)[name] = tensor
    norm.num_batches_tracked = torch.zeros((), dtype=torch.long, device=tensors["running_mean"].device)
    place = _free_name(model, named["running_mean"].rpartition(".")[0])
    model.add_submodule(place, norm)
    for node in nodes:
        with model.graph.inserting_before(node):
            call = model.graph.call_module(place, (ARGUMENTS.bind(*node.args, **node.kwargs).arguments["input"],))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        model.graph.erase_node(node)
    for reader in readers:
        model.graph.erase_node(reader)
    for target in named.values():
        path, _, name = target.rpartition(".")
        delattr(model.get_submodule(path), name)


def _others_hold(model: fx.GraphModule, targets: set[str]) -> bool:
    """Whether a module that the graph calls holds one of these tensors, or they are also found under other names."""
    called = {str(n.target) for n in model.graph.nodes if n.op == "call_module"}
    if any(outer in called for target in targets for outer in outer_names(target)):
        return True
    found = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return bool({id(t) for name, t in found if name in targets} & {id(t) for name, t in found if name not in targets})


def _free_name(model: fx.GraphModule, path: str) -> str:
    owner, name, number = model.get_submodule(path), "norm", 0
    while hasattr(owner, name):
        name, number = f"norm_{number}", number + 1
    return f"{path}.{name}" if path else name
