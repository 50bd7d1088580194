"""What ``package.module:name`` names, as people write it on the command line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from passes.errors import SurgeryValueError, nearest

__all__ = ["callable_named"]


def callable_named(module_name: str, name: str, argument: str, other: str) -> Callable[..., Any]:
    """Import a module and give what it has under a name.

    Args:
        module_name: with dots; modules in the current folder are found, as by ``python -m``.
        name: of a function or class in it.
        argument: what the text was given for.
        other: what else the text could have meant, for errors.

    Raises:
        SurgeryValueError: there is no such module, importing it fails, or it has no such callable.
    """
    if "" not in sys.path:
        sys.path.insert(0, "")
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise SurgeryValueError(f"{argument}: {module_name!r} is no name of a module, and there is no {other}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _failed(module_name, name, error) from error
        raise SurgeryValueError(f"{module_name}:{name}: there is no module {module_name!r}, and no {other}") from error
    except (Exception, SystemExit) as error:  # the user's own code runs here: it may raise anything
        raise _failed(module_name, name, error) from error
    found = getattr(module, name, None)
    if not callable(found):
        raise SurgeryValueError(f"{module_name}:{name}: {module_name} has no callable of that name; {nearest(name, _callables(module))}")
    made: Callable[..., Any] = found
    return made


def _callables(module: ModuleType) -> list[str]:
    return [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]


def _failed(module_name: str, name: str, error: BaseException) -> SurgeryValueError:
    return SurgeryValueError(f"{module_name}:{name}: importing {module_name} failed: {type(error).__name__}: {error}")
