"""The registry of kinds. A new kind is added to ``KINDS`` and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from passes.blockwise import Blockwise
from passes.channel import CHANNEL
from passes.cp import CP_KIND
from passes.depthwise import DEPTHWISE
from passes.errors import SurgeryValueError, nearest
from passes.factorization import Decision, Factorization, Keep
from passes.geometry import Geometry
from passes.spatial import SPATIAL
from passes.svd import SVD_KIND
from passes.tucker import TUCKER

__all__ = ["KINDS", "decision_from_json", "kind_named", "kind_of", "usual_kind"]

KINDS = tuple(Blockwise(kind) for kind in (TUCKER, SVD_KIND, SPATIAL, CHANNEL, DEPTHWISE, CP_KIND))


def kind_named(name: str) -> Blockwise:
    """The kind of this name, as plans and ``method=`` write it."""
    known = {kind.name: kind for kind in KINDS}
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
