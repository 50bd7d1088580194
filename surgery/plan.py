"""The plan: what is decided for every layer of a model. Kinds and ranks, no weights; read, edited, saved, compared, replayed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from passes.errors import SurgeryError, SurgeryTypeError, SurgeryValueError
from passes.factorization import Decision, Factorization, Keep
from passes.kinds import decision_from_json
from surgery.files import as_path, write_atomically

if TYPE_CHECKING:
    from surgery.cost.outcome import LatencyOutcome
    from surgery.gate import Trial

__all__ = ["Change", "Plan", "no_duplicates"]

FORMAT = "surgery.plan"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Change:
    """One difference between two plans: what each decides for a layer, None where it does not name the layer."""

    site: str
    before: Decision | None
    after: Decision | None

    def __str__(self) -> str:
        return f"{self.site}: {self.before} -> {self.after}"


class Plan(MutableMapping[str, Decision]):
    """An ordered map from layer name to factorization or ``Keep(reason)``. Edit it like a dict; ``decompose(model, plan)`` replays it.

    Args:
        decisions: the first entries.

    Raises:
        SurgeryTypeError: a name is no string, or a value neither a factorization nor a ``Keep``.
    """

    def __init__(self, decisions: Mapping[str, Decision] | None = None) -> None:
        self._decisions: dict[str, Decision] = {}
        self.latency: LatencyOutcome | None = None  # what a latency budget came to; of the moment, so not saved
        self.trials: tuple[Trial, ...] = ()  # what was tried where a metric of one's own decided; likewise
        if not isinstance(decisions, Mapping | None):
            raise SurgeryTypeError(f"plan: expected a mapping from layer names to factorizations, got {type(decisions).__name__}")
        self.update(decisions or {})

    def __getitem__(self, name: str) -> Decision:
        return self._decisions[name]

    def __setitem__(self, name: str, decision: Decision) -> None:
        if not isinstance(name, str):
            raise SurgeryTypeError(f"plan: layer names are strings, got {name!r}")
        if not isinstance(decision, Factorization | Keep):
            raise SurgeryTypeError(f"plan: {name!r} must get a factorization or Keep, for example Tucker(8, 4) or Keep('mine'); got {decision!r}")
        self._decisions[name] = decision

    def __delitem__(self, name: str) -> None:
        del self._decisions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._decisions)

    def __len__(self) -> int:
        return len(self._decisions)

    def __copy__(self) -> Plan:
        made = Plan(self)
        made.latency, made.trials = self.latency, self.trials
        return made

    def __repr__(self) -> str:
        cut = sum(isinstance(d, Factorization) for d in self.values())
        return f"Plan({cut} of {len(self)} layers cut)"

    def __str__(self) -> str:
        width = max((len(name) for name in self), default=0)
        return "\n".join(f"{name:{width}}  {decision}" for name, decision in self.items())

    def _repr_html_(self) -> str:
        from surgery.tables import plan_table, to_html

        return to_html(plan_table(self))

    def diff(self, other: Plan) -> tuple[Change, ...]:
        """What changes from this plan to ``other``, in this plan's order, then the layers that only ``other`` names; empty where nothing does."""
        if not isinstance(other, Mapping):
            raise SurgeryTypeError(f"diff: expected another plan, got {type(other).__name__}")
        names = list(dict.fromkeys([*self, *other]))
        return tuple(Change(n, self.get(n), other.get(n)) for n in names if self.get(n) != other.get(n))

    def to_json(self) -> str:
        """Deterministic text with format and version; the same plan gives the same bytes."""
        sites = {name: decision.to_json() for name, decision in self.items()}
        return json.dumps({"format": FORMAT, "version": VERSION, "sites": sites}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """The plan that ``to_json`` wrote.

        Raises:
            SurgeryValueError: not such a text; the message names the layer and field that are wrong.
        """
        if not isinstance(text, str | bytes | bytearray):
            raise SurgeryTypeError(f"plan: expected JSON text, got {type(text).__name__}")
        try:
            data = json.loads(text, object_pairs_hook=no_duplicates)
        except (ValueError, RecursionError) as error:
            raise SurgeryValueError(f"plan: not JSON ({error})") from error
        return cls.from_data(data)

    @classmethod
    def from_data(cls, data: Any) -> Plan:
        """The plan in ``data``, parsed JSON.

        Raises:
            SurgeryValueError: the layer or field that is wrong is named.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise SurgeryValueError(f'plan: expected an object with "format": "{FORMAT}"')
        if type(data.get("version")) is not int or data["version"] != VERSION:
            raise SurgeryValueError(f"plan: version {data.get('version')!r} is not one that this release reads ({VERSION})")
        if set(data) != {"format", "version", "sites"} or not isinstance(data["sites"], dict):
            raise SurgeryValueError(f'plan: expected the fields "format", "version" and "sites" (an object), got {sorted(data)}')
        plan = cls()
        for name, item in data["sites"].items():
            try:
                plan[name] = decision_from_json(item)
            except SurgeryError as error:
                raise SurgeryValueError(f"plan: layer {name!r}: {error}") from error
        return plan

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``to_json`` to the file ``path``; an error (``OSError``) leaves whatever was there."""
        write_atomically(as_path("path", path), self.to_json().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read the plan in the file ``path``.

        Raises:
            SurgeryValueError: no plan; the message names file, layer and field.
            OSError: it cannot be read.
        """
        try:
            return cls.from_json(as_path("path", path).read_bytes())
        except SurgeryValueError as error:
            raise SurgeryValueError(f"{path}: {error}") from error


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of these pairs; ``ValueError`` where a key appears twice."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} appears twice")
        found[key] = value
    return found
