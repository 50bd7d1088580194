"""What a copy of a model shares with it: functions with what they close over, attributes of classes, globals.

``copy.deepcopy`` takes functions and classes as they are, so whatever a model's code keeps there, or calls through there, is nobody's own.
"""

from __future__ import annotations

import dis
import functools
import types
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from passes.chain import HOOKS
from passes.held import DEPTH, MOST, held_by, values_in

__all__ = ["kept_shared_state", "modules_not_copied"]

BIND = "make it a method of the class, or bind it with types.MethodType or functools.partial"
TRAINING = ("torch.optim", "torch.utils.data")  # what feeds and steps a network takes no part in what it computes
MAPPINGS = (dict, OrderedDict, defaultdict)  # of exactly these types: others may load or compute what is asked of them
CONTAINERS = (*MAPPINGS, list, set)


def modules_not_copied(model: nn.Module) -> Iterator[tuple[str, str, str, str]]:
    """What modules hold, in attributes and hooks, that a deep copy takes as it is and that reaches a module of the model.

    These are functions that reach one by their closure, defaults or globals, and weak references. A bound method, and the arguments of a
    ``functools.partial``, are copied with the model; the functions inside them are looked at too. What ``torch.compile`` puts on a module is not
    copied with it, and does not count.

    Yields:
        First name of the module, its attribute, what it holds and what to do about that, for a message.
    """
    known = {id(module): f"{name or 'the model'} ({type(module).__name__})" for name, module in model.named_modules()}
    for name, holder in model.named_modules():
        if "_orig_mod" in holder._modules:  # compiled: its copy is compiled anew
            continue
        own = _copied(holder)
        for attribute, value in held_by(holder):
            if attribute == "_compiled_call_impl" or not (own is None or attribute in own or attribute in HOOKS):
                continue
            if type(value).__module__.startswith(TRAINING):
                continue
            for held in (value,) if isinstance(holder, fx.GraphModule) else values_in(value):
                has = "is" if held is value else "holds"
                if isinstance(held, weakref.ref) and id(held()) in known:
                    yield name, attribute, f"{has} a weak reference to {known[id(held())]}", "hold the module itself, in a list"
                for function in _functions_of(held):
                    if held is not value and _is_torchs(function.__module__):  # it asks for no more than the device (quantization)
                        continue
                    for inner in _enclosed(function, set()):
                        if id(inner) in known:
                            yield name, attribute, f"{has} a function that reaches {known[id(inner)]} by its closure, defaults or globals", BIND


def _copied(holder: nn.Module) -> Mapping[str, Any] | None:
    """What a class that says so itself hands to its copies; they make the rest anew (torchmetrics' wrapped methods)."""
    if type(holder).__getstate__ is object.__getstate__:
        return None
    try:
        state = holder.__getstate__()  # type: ignore[no-untyped-call]
    except Exception:  # code of others; that it cannot be copied is told when it is
        return None
    return state if isinstance(state, dict) and "_modules" in state else None  # else its attributes may be anywhere


@contextmanager
def kept_shared_state(model: nn.Module) -> Iterator[None]:
    """While a model is traced its code runs on proxies: those that it leaves in shared state are taken out again, with what stood there before.

    Looked at are the attributes of the classes of all modules, and the globals, closures and defaults of their methods, of functions that modules
    hold, and of hooks, with all dicts, lists, sets and instances of plain classes of the same file in them.
    """
    slots = _slots(model)
    before = [(slot, slot.read()) for slot in slots]
    try:
        yield
    finally:
        for slot, content in before:
            if any(_is_proxied(value, 0) for value in _items(slot.read())):
                slot.write(content)


class _Slot:
    """A place that holds values: how to take a shallow copy of what is in it, and how to put that back."""

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], None]) -> None:
        self.read, self.write = read, write


def _slots(model: nn.Module) -> list[_Slot]:
    slots: list[_Slot] = []
    seen: set[int] = set()

    def container(value: Any, depth: int, home: str | None) -> None:
        if type(value) is types.SimpleNamespace or (type(value).__module__ == home and isinstance(getattr(value, "__dict__", None), dict)):
            value = None if isinstance(value, nn.Module | type) else vars(value)
        if type(value) in CONTAINERS and id(value) not in seen and depth < DEPTH and len(value) <= MOST:
            seen.add(id(value))
            for item in list(_items(value)):
                container(item, depth + 1, home)
            slots.append(_Slot(lambda: _shallow(value), lambda content: _refill(value, content)))

    def function(value: types.FunctionType) -> None:
        if id(value) in seen or _is_torchs(value.__module__):
            return
        seen.add(id(value))
        names = value.__globals__
        if id(names) not in seen and not _is_torchs(names.get("__name__")):
            seen.add(id(names))
            for key, item in list(names.items()):
                if key != "__builtins__":
                    container(item, 0, names.get("__name__"))
            slots.append(_Slot(lambda: {k: v for k, v in names.items() if k != "__builtins__"}, lambda content: _rename(names, content)))
        for cell in value.__closure__ or ():
            if id(cell) not in seen and _is_full(cell):
                seen.add(id(cell))
                inner = cell.cell_contents
                container(inner, 0, value.__module__)
                for nested in _functions_of(inner):
                    function(nested)
                slots.append(_Slot(lambda cell=cell: [cell.cell_contents], lambda content, cell=cell: _set_cell(cell, content)))  # type: ignore[misc]
        for item in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()):
            container(item, 0, value.__module__)

    def cls_(value: type) -> None:
        if id(value) in seen or _is_torchs(value.__module__) or value is object:
            return
        seen.add(id(value))
        for item in list(vars(value).values()):
            container(item, 0, value.__module__)
            for nested in _functions_of(item):
                function(nested)
        slots.append(_Slot(lambda: dict(vars(value)), lambda content: _reset(value, content)))

    for module in model.modules():
        for base in type(module).__mro__:
            cls_(base)
        hooks = [hook for name in HOOKS if isinstance(table := getattr(module, name, None), dict) for hook in table.values()]
        for held in (*vars(module).values(), *hooks):
            for found in _functions_of(held):
                function(found)
    return slots


def _functions_of(value: Any) -> Iterator[types.FunctionType]:
    """The functions that calling a value runs first: inside bound methods, partials, descriptors and what ``functools.wraps`` wrapped."""
    if isinstance(value, types.FunctionType):
        yield value
    elif isinstance(value, types.MethodType | classmethod | staticmethod):
        yield from _functions_of(value.__func__)
    elif isinstance(value, functools.partial):
        yield from _functions_of(value.func)
        for argument in (*value.args, *value.keywords.values()):
            yield from _functions_of(argument)
    elif isinstance(value, property):
        yield from _functions_of(value.fget)


def _enclosed(function: types.FunctionType, seen: set[int]) -> Iterator[Any]:
    """Every module that a function reaches by its closure, its defaults and the globals it names.

    Also through methods, partials and containers that stand there, and through functions, as globals only those of the same file.
    """
    if id(function) in seen:
        return
    seen.add(id(function))
    held = [cell.cell_contents for cell in function.__closure__ or () if _is_full(cell)]
    for value in (*held, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        yield from _reached(value, seen, 0)
    for name in _globals_in(function.__code__):
        value = function.__globals__.get(name)
        if not isinstance(value, types.FunctionType) or value.__globals__ is function.__globals__:
            yield from _reached(value, seen, 0)


def _globals_in(code: types.CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname == "LOAD_GLOBAL":
            yield str(instruction.argval)
        elif isinstance(instruction.argval, types.CodeType):  # of a function inside
            yield from _globals_in(instruction.argval)


def _reached(value: Any, seen: set[int], depth: int) -> Iterator[Any]:
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, types.MethodType):
        yield from _reached(value.__self__, seen, depth)
        yield from _reached(value.__func__, seen, depth)
    elif isinstance(value, functools.partial):
        for item in (value.func, *value.args, *value.keywords.values()):
            yield from _reached(item, seen, depth)
    elif isinstance(value, types.FunctionType):
        yield from _enclosed(value, seen)
    elif type(value) in (*CONTAINERS, tuple, frozenset) and depth < DEPTH:
        for item in _items(value):
            yield from _reached(item, seen, depth + 1)


def _is_torchs(module: str | None) -> bool:
    return module is not None and (module == "torch" or module.startswith("torch."))


def _is_full(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # a name that is not bound yet
        return False
    return True


def _set_cell(cell: types.CellType, content: list[Any]) -> None:
    cell.cell_contents = content[0]


def _items(value: Any) -> Iterator[Any]:
    yield from value.values() if isinstance(value, dict) else value


def _shallow(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else list(value) if isinstance(value, list) else set(value)


def _refill(value: Any, content: Any) -> None:
    if isinstance(value, list):
        value[:] = content
    else:
        value.clear()
        value.update(content)


def _rename(names: dict[str, Any], content: dict[str, Any]) -> None:
    """Put back only what a proxy has taken the place of: other globals may have been set by others meanwhile."""
    for key in [key for key, value in names.items() if _is_proxied(value, 0)]:
        if key in content:
            names[key] = content[key]
        else:
            del names[key]


def _reset(cls: type, content: dict[str, Any]) -> None:
    for key in [key for key, value in vars(cls).items() if _is_proxied(value, 0)]:
        if key in content:
            setattr(cls, key, content[key])
        else:
            delattr(cls, key)


def _is_proxied(value: Any, depth: int) -> bool:
    if isinstance(value, fx.Proxy):
        return True
    if type(value) not in (*CONTAINERS, tuple, frozenset) or depth >= DEPTH or len(value) > MOST:
        return False
    return any(_is_proxied(item, depth + 1) for item in list(_items(value)))
