"""What an attribute of a module holds: itself, and whatever is in the containers and objects that stand there.

A copy of the module copies most of it, a replaced layer is replaced in none of it.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, fx, nn

from passes.chain import HOOKS, MODULE_ATTRIBUTES

__all__ = ["DEPTH", "MOST", "held_by", "values_in"]

DEPTH = 4  # of containers in containers
DEPTH_OF_OBJECTS = 2  # counted from DEPTH: an object's attributes, and what is in containers there
MOST = 10_000  # a container of more is data
PLAIN = (str, bytes, int, float, Tensor)
SEQUENCES = (list, tuple, set, frozenset, deque)
CLOSED = (nn.Module, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, fx.Graph, *weakref.ProxyTypes)


def held_by(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and value of every attribute that is not one of ``nn.Module`` itself, and table and hook of every hook around its calls."""
    attributes = vars(module)
    yield from ((name, value) for name, value in list(attributes.items()) if name not in MODULE_ATTRIBUTES)
    for name in HOOKS:
        table = attributes.get(name)
        if isinstance(table, dict):
            yield from ((name, hook) for hook in table.values())


def values_in(value: Any, depth: int = 0) -> Iterator[Any]:
    """A value and all that it holds, to a depth of four, but for tensors, numbers, texts and proxies.

    Looked into are containers, partials, bound methods, dataclasses, namespaces and objects that can be called; of other objects only what they
    hold directly or in one container. Modules, functions and weak references are not opened.
    """
    if value is None or type(value) in weakref.ProxyTypes or isinstance(value, PLAIN):
        return
    yield value
    if depth >= DEPTH or isinstance(value, CLOSED):
        return
    sequence: Any = next((kind for kind in SEQUENCES if isinstance(value, kind)), None)
    if isinstance(value, dict):
        inner: Any = dict.values(value)  # by the base class: a subclass may load or compute what is asked of it
    elif sequence is not None:
        inner = [*sequence.__iter__(value)]
    elif isinstance(value, functools.partial):
        inner = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, types.MethodType):
        inner, depth = [value.__self__], depth - 1  # it is as near as the method
    elif is_dataclass(value) and not hasattr(value, "__dict__"):
        inner = [getattr(value, field.name, None) for field in fields(value)]
    elif isinstance(getattr(value, "__dict__", None), dict):
        if not (callable(value) or is_dataclass(value) or isinstance(value, types.SimpleNamespace)):
            depth = max(depth, DEPTH - DEPTH_OF_OBJECTS)
        inner = vars(value).values()
    else:
        return
    for item in list(inner) if len(inner) <= MOST else ():
        yield from values_in(item, depth + 1)
