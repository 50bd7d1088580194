"""What can be decided for a site: a factorization (kind and ranks), or to keep the layer and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any, ClassVar, Self

from passes.errors import SurgeryTypeError, SurgeryValueError

__all__ = ["Decision", "Factorization", "Keep"]

LARGEST = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Factorization:
    """Base of all factorizations: a kind's name and one rank a mode, in the order of the kind's unfoldings."""

    kind: ClassVar[str]

    def __post_init__(self) -> None:
        for field in fields(self):
            rank = getattr(self, field.name)
            optional = any(word in str(field.type) for word in ("None", "Optional"))
            if rank is None and optional:
                continue
            if not isinstance(rank, Integral) or isinstance(rank, bool):
                expected = "an int or None" if optional else "an int"
                raise SurgeryTypeError(f"{type(self).__name__}: {field.name} must be {expected}, got {rank!r}")
            if rank < 1:
                raise SurgeryValueError(f"{type(self).__name__}: {field.name} must be at least 1, got {rank}")
            if int(rank) > LARGEST:
                raise SurgeryValueError(f"{type(self).__name__}: {field.name} is larger than any layer ({LARGEST:,} at most)")
            object.__setattr__(self, field.name, int(rank))
        if all(rank is None for rank in self.ranks):
            raise SurgeryValueError(f"{type(self).__name__}: at least one rank must be given; to leave a layer whole use Keep")

    @property
    def ranks(self) -> tuple[int | None, ...]:
        """One a mode, in the order of the fields; None for a mode that stays uncut."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def to_json(self) -> dict[str, Any]:
        """Kind and ranks as plain data, as plans write them."""
        return {"kind": self.kind} | {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The factorization in plain ``data``.

        Raises:
            SurgeryValueError: other fields than this kind's, or a rank below 1.
            SurgeryTypeError: a rank that is no int.
        """
        known = {field.name for field in fields(cls)}
        given = set(data) - {"kind"}
        if given != known:
            raise SurgeryValueError(f"{cls.kind!r} needs exactly the fields {sorted(known)}, got {sorted(given)}")
        return cls(**{name: data[name] for name in known})


@dataclass(frozen=True, slots=True)
class Keep:
    """Leave the layer as it is, for a stated reason."""

    reason: str

    def __post_init__(self) -> None:
        if not isinstance(self.reason, str) or not self.reason:
            raise SurgeryTypeError(f"Keep needs a reason (a non-empty string), got {self.reason!r}")

    def to_json(self) -> dict[str, Any]:
        """The reason as plain data, as plans write it."""
        return {"kind": "keep", "reason": self.reason}


Decision = Factorization | Keep
