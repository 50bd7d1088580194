"""What was done to an ONNX file, kept in its metadata: the plan and the passes, as exporters write them, and what only reports need."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from passes.errors import SurgeryError, SurgeryValueError
from surgery.export.metadata import PASSES, PLAN, metadata_from
from surgery.plan import Plan
from surgery.record import SiteRecord

if TYPE_CHECKING:
    from onnx import ModelProto

    from surgery.report import Report

__all__ = ["FileRecord", "read_file_record", "write_plan", "write_report"]

RECORD = "surgery.record"
VERSION = 1


@dataclass(slots=True, kw_only=True)
class FileRecord:
    """What a file says of itself.

    Attributes:
        plan: what each layer now is; empty for a file that nobody has worked on.
        passes: that changed the network, in order.
        weights: name of the weight that each chain replaced, by the chain's.
        errors: relative error of each cut, by the chain's name.
        output_errors: relative error of a chain's outputs on the calibration batches, by its name.
        shapes: sizes of the inputs that MACs were counted with.
        calibrated: how many examples the last cut was calibrated on.
    """

    plan: Plan = field(default_factory=Plan)
    passes: tuple[str, ...] = ()
    weights: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    output_errors: dict[str, float] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] | None = None
    calibrated: int = 0

    def sites(self) -> dict[str, SiteRecord]:
        """As reports want it."""
        return {
            name: SiteRecord(
                name=name,
                reason=getattr(decision, "reason", None),
                error=self.errors.get(name),
                calls=None,
                output_error=self.output_errors.get(name),
            )
            for name, decision in self.plan.items()
        }


def read_file_record(model: ModelProto) -> FileRecord:
    """What the metadata of a file tell.

    Raises:
        SurgeryValueError: they bear our names and are something else; the message names the entry.
    """
    found = {entry.key: entry.value for entry in model.metadata_props}
    record = FileRecord()
    key = PLAN
    try:
        if PLAN in found:
            record.plan = Plan.from_json(found[PLAN])
        key = PASSES
        record.passes = tuple(str(name) for name in json.loads(found.get(PASSES, "[]")))
        key = RECORD
        data: Mapping[str, Any] = json.loads(found.get(RECORD, "{}"))
        record.weights = {str(name): str(weight) for name, weight in data.get("weights", {}).items()}
        record.errors = {str(name): float(error) for name, error in data.get("errors", {}).items()}
        record.output_errors = {str(name): float(error) for name, error in data.get("output_errors", {}).items()}
        shapes = data.get("shapes")
        record.shapes = None if shapes is None else {str(name): tuple(int(size) for size in sizes) for name, sizes in shapes.items()}
        record.calibrated = int(data.get("calibrated", 0))
    except (SurgeryError, ValueError, TypeError, AttributeError) as error:
        raise SurgeryValueError(f"the metadata entry {key!r} of this ONNX file cannot be read ({error}); remove it to work on the file") from error
    return record


def write_plan(model: ModelProto, record: FileRecord) -> None:
    """Put a record into a file's metadata."""
    data = {name: getattr(record, name) for name in ("weights", "errors", "output_errors", "shapes", "calibrated")} | {"version": VERSION}
    _set(model, {PLAN: record.plan.to_json(), PASSES: json.dumps(record.passes), RECORD: json.dumps(data, ensure_ascii=False)})


def write_report(model: ModelProto, report: Report) -> None:
    """Put the plan into a file's metadata as exporters write it."""
    _set(model, metadata_from(report))


def _set(model: ModelProto, entries: Mapping[str, str]) -> None:
    kept = {entry.key: entry.value for entry in model.metadata_props} | dict(entries)
    del model.metadata_props[:]
    for key, value in kept.items():
        model.metadata_props.add(key=key, value=value)
