"""Write docs/api.md, the reference of all public names, from their signatures and docstrings.

    python tools/api_reference.py [--check]

``--check`` writes nothing and exits with 1 where the file is not up to date. A test does the same.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import passes
import surgery
from passes.geometry import Geometry, Piece
from passes.kind import Kind
from passes.linalg import Spectrum
from passes.site import Site
from surgery.alternatives import Alternative, Tradeoff, TradeoffRow
from surgery.benchmarking.result import LayerResult, RuntimeResult
from surgery.cost.outcome import LatencyOutcome
from surgery.plan import Change

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
WIDTH = 120
MODULES: tuple[ModuleType, ...] = (surgery, surgery.ranks, passes)
HANDED = (Site, Geometry, Spectrum, Kind, Piece, Change, Tradeoff, TradeoffRow, Alternative, RuntimeResult, LayerResult, LatencyOutcome)
"""What public functions give, and what rules, kinds and passes of one's own are given."""
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Source|Sources):(?: (.*))?$")
INTRODUCTION = """# API reference

Made from the docstrings by `python tools/api_reference.py`; what is wrong here is mended there. Weights have the shape (C_out, C_in, *kernel); times
are in milliseconds where a name ends in `_ms`; MACs are multiply-accumulates (FLOPs are twice as many); errors of weights are relative Frobenius
norms. All errors that are raised on purpose are a `SurgeryError`; `OSError` passes through.
"""


def reference() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for module in MODULES:
        parts.append(f"## {module.__name__}\n\n{prose(first_paragraph(module))}\n")
        items = [(name, getattr(module, name)) for name in module.__all__ if not name.startswith("__")]
        parts += [entry(f"{module.__name__}.{name}", item) for name, item in items if not isinstance(item, ModuleType)]
    parts.append("## What they give and are given\n\nPublic functions answer with these, and rules, kinds and passes of one's own are given them.\n")
    parts += [entry(f"{item.__module__}.{item.__name__}", item) for item in HANDED]
    return "\n".join(parts)


def first_paragraph(module: ModuleType) -> str:
    return inspect.cleandoc(module.__doc__ or "").partition("\n\n")[0]


def entry(name: str, item: Any) -> str:
    """A public name: what it is, its docstring, and for classes what they have."""
    if inspect.isclass(item):
        return "\n".join([f"### {name}\n", code(class_line(name, item)), "", prose(doc_of(item)), "", *members(item)])
    if callable(item):
        return "\n".join([f"### {name}\n", code(signature(name, item)), "", prose(doc_of(item)), ""])
    return f"### {name}\n\n{code(f'{name} = {shown(item)}')}\n"


def class_line(name: str, item: type) -> str:
    if issubclass(item, BaseException):
        return f"class {name}({', '.join(base.__name__ for base in item.__bases__)})"
    if getattr(item, "_is_protocol", False):
        return f"class {name}(Protocol)"
    maker = next(base for base in item.__mro__ if {"__init__", "__new__"} & set(vars(base)))
    if maker.__module__.partition(".")[0] not in ("surgery", "passes", "builtins"):
        return f"class {name}({', '.join(base.__name__ for base in item.__bases__)})"  # how it is made is told where it comes from
    return "class " + signature(name, item)


def members(item: type) -> Iterator[str]:
    """Public methods and properties that the class has from this project, but for those of a base that has an entry of its own."""
    public = {id(getattr(module, name)) for module in MODULES for name in module.__all__}
    ours = [c for c in item.__mro__ if c.__module__.partition(".")[0] in ("surgery", "passes")]
    for cls in [c for c in ours if c is item or id(c) not in public]:
        for name, member in vars(cls).items():
            if (name.startswith("_") and name != "__call__") or not doc_of(member):
                continue  # what a protocol documents (``Host``, ``Pass``) is documented there
            if isinstance(member, property | cached_property):
                yield f"`{name}`: {prose(doc_of(member))}\n"
            elif inspect.isfunction(member) or isinstance(member, classmethod):
                yield f"{code(signature(name, member))}\n{prose(doc_of(member))}\n"


def signature(name: str, item: Any) -> str:
    """As it would be written; with a parameter a line where it is long."""
    found = inspect.signature(item.__func__ if isinstance(item, classmethod) else item)
    given = [p for p in found.parameters.values() if p.name not in ("self", "cls")]
    words = [written(parameter) for parameter in given]
    first = next((i for i, p in enumerate(given) if p.kind is p.KEYWORD_ONLY), None)
    if first is not None and not any(p.kind is p.VAR_POSITIONAL for p in given):
        words.insert(first, "*")
    returns = "" if inspect.isclass(item) or found.return_annotation is found.empty else f" -> {annotation(found.return_annotation)}"
    line = f"{name}({', '.join(words)}){returns}"
    return line if len(line) <= WIDTH else "\n".join([f"{name}(", *(f"    {word}," for word in words), f"){returns}"])


def written(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    told = "" if parameter.annotation is parameter.empty else f": {annotation(parameter.annotation)}"
    equals = " = " if told else "="
    return f"{stars}{parameter.name}{told}{'' if parameter.default is parameter.empty else equals + repr(parameter.default)}"


def annotation(found: Any) -> str:
    return found if isinstance(found, str) else inspect.formatannotation(found)


def shown(item: Any) -> str:
    return f"({', '.join(part.__name__ for part in item)})" if isinstance(item, tuple) and all(inspect.isclass(p) for p in item) else repr(item)


def code(text: str) -> str:
    return f"```text\n{text}\n```"


def doc_of(item: Any) -> str:
    return inspect.cleandoc(item.__doc__ or "")


def prose(text: str) -> str:
    """A docstring as Markdown: sections in bold, their entries as lists, indented examples as code."""
    out: list[str] = []
    section = None
    for line in re.sub(r"``([^`]+)``", r"`\1`", text).splitlines():
        heading = SECTION.match(line)
        if heading:
            section = heading[1]
            out += ["", f"**{section}**{'' if heading[2] is None else ': ' + heading[2]}", ""]
        elif section in ("Args", "Attributes", "Raises") and re.match(r"^    \S", line):
            name, found, rest = line.strip().partition(": ")
            out.append(f"- `{name}`: {rest}" if found else f"- {line.strip()}")
        elif section is not None and line.startswith("    "):
            out.append(("  " if section in ("Args", "Attributes", "Raises") else "") + line.strip())
        else:
            section = None if line.strip() else section
            out.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only tell whether the file is up to date")
    if not parser.parse_args().check:
        PAGE.write_text(reference())
        return 0
    if PAGE.exists() and PAGE.read_text() == reference():
        return 0
    print(f"{PAGE} is not up to date: python tools/api_reference.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
