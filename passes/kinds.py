"""The registry of kinds. A kind of this project is added to ``KINDS`` and nowhere else; one of somebody else's program to ``register_kind``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from passes.blockwise import Blockwise
from passes.channel import CHANNEL
from passes.cp import CP_KIND
from passes.depthwise import DEPTHWISE
from passes.errors import SurgeryTypeError, SurgeryValueError, nearest
from passes.factorization import Decision, Factorization, Keep
from passes.geometry import Geometry
from passes.kind import Kind
from passes.spatial import SPATIAL
from passes.svd import SVD_KIND
from passes.tucker import TUCKER

__all__ = ["KINDS", "all_kinds", "decision_from_json", "kind_named", "kind_of", "register_kind", "usual_kind"]

KINDS = tuple(Blockwise(kind) for kind in (TUCKER, SVD_KIND, SPATIAL, CHANNEL, DEPTHWISE, CP_KIND))
RESERVED = ("auto", "keep")
FLAGS = ("ranks_are_channels", "mixes_inputs", "has_spectra")
MOST_MODES = 2
METHODS = ("refuses", "full_ranks", "from_ranks", "unfoldings", "shapes", "split", "error_surface", "merge")

_registered: dict[str, Blockwise] = {}


def all_kinds() -> tuple[Blockwise, ...]:
    """The kinds of this project, then those that were registered."""
    return (*KINDS, *_registered.values())


def register_kind(kind: Kind) -> Blockwise:
    """Make a kind of one's own known in this process: to ``method=``, to plans, to ``save`` and ``load``, and to ``method="auto"``.

    Registered again under the same name it takes the place of the one before (a notebook's cell that is run twice). A process that loads what
    was saved with it must register it first: nothing is ever imported because a file names it.

    Args:
        kind: an object with the methods of ``passes.kind.Kind``.

    Returns:
        The kind for layers of any geometry, grouped and transposed ones too.

    Raises:
        SurgeryTypeError: it has no dataclass of its ranks, with one field a mode and a text ``kind`` as its name, or lacks a method.
        SurgeryValueError: its name is taken by a kind of this project.
    """
    factorization = getattr(kind, "factorization", None)
    if not (isinstance(factorization, type) and issubclass(factorization, Factorization) and is_dataclass(factorization)):
        raise SurgeryTypeError(f"{type(kind).__name__}: factorization must be a frozen dataclass on Factorization that holds its ranks")
    name = getattr(factorization, "kind", None)
    if not isinstance(name, str) or not name:
        raise SurgeryTypeError(f"{factorization.__name__}: kind must be the name of the kind, a text that is not empty, got {name!r}")
    if name in RESERVED or name in {own.name for own in KINDS}:
        raise SurgeryValueError(f"{factorization.__name__}: the name {name!r} is taken; give the kind another one")
    missing = [m for m in METHODS if not callable(getattr(kind, m, None)) or getattr(type(kind), m, None) is getattr(Kind, m)]
    missing += [flag for flag in FLAGS if not isinstance(getattr(kind, flag, None), bool)]
    if missing:
        raise SurgeryTypeError(f"{type(kind).__name__}: lacks {', '.join(missing)} of passes.kind.Kind")
    if len(getattr(kind, "modes", ())) != len(fields(factorization)):
        raise SurgeryTypeError(f"{type(kind).__name__}: modes must name the ranks of {factorization.__name__}, {len(fields(factorization))} of them")
    if len(kind.modes) > MOST_MODES and kind.has_spectra:
        raise SurgeryTypeError(f"{type(kind).__name__}: a kind with spectra has at most {MOST_MODES} ranks, as budgets look at all pairs of them")
    _registered[name] = Blockwise(kind)
    return _registered[name]


def kind_named(name: str) -> Blockwise:
    """The kind of this name, as plans and ``method=`` write it."""
    known = {kind.name: kind for kind in all_kinds()}
    if name not in known:
        raise SurgeryValueError(f"unknown kind of factorization {name!r}: {nearest(str(name), known)}")
    return known[name]


def kind_of(factorization: Factorization) -> Blockwise:
    """The kind that a factorization belongs to."""
    return kind_named(factorization.kind)


def usual_kind(geometry: Geometry, method: str) -> Blockwise:
    """The kind for a layer under ``method``: a layer of one pixel has two modes only and always takes SVD."""
    return kind_named("svd" if geometry.is_pointwise else method)


def decision_from_json(data: Mapping[str, Any]) -> Decision:
    """A factorization or a Keep from its JSON object; an error names the field that is wrong."""
    if not isinstance(data, Mapping) or not isinstance(data.get("kind"), str):
        raise SurgeryValueError(f"expected an object with a text field 'kind', got {data!r}")
    if data["kind"] == "keep":
        if set(data) != {"kind", "reason"}:
            raise SurgeryValueError(f"'keep' needs exactly the fields ['kind', 'reason'], got {sorted(data)}")
        return Keep(data["reason"])
    return kind_named(data["kind"]).factorization.from_json(data)
