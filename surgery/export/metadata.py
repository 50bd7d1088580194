"""How an exported network was made, written into its file: the plan, the passes, the version."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from passes.errors import SurgeryValueError
from passes.factorization import Keep
from surgery.files import as_path
from surgery.plan import Plan
from surgery.report import Report, report
from surgery.version import __version__

__all__ = ["KEYS", "PASSES", "PLAN", "exported_plan", "metadata_from", "metadata_of"]

PLAN, PASSES = "surgery.plan", "surgery.passes"
KEYS = (PLAN, PASSES, "surgery.version")
LONGEST = 1 << 26  # bytes of one of them; plans of the largest networks take a hundredth of it


def metadata_of(model: nn.Module) -> dict[str, str]:
    """The plan of what a model now is (``Plan.to_json``), the names of the passes that made it so, and this release, by ``KEYS``."""
    return metadata_from(report(model))


def metadata_from(found: Report) -> dict[str, str]:
    """As ``metadata_of``, from the report of the model."""
    plan = Plan({row.name: row.factorization or Keep(row.reason or "kept") for row in found.layers})
    return dict(zip(KEYS, (plan.to_json(), json.dumps(found.passes), __version__), strict=True))


def exported_plan(path: str | os.PathLike[str]) -> Plan:
    """The plan in a file that one of the exporters wrote: which layers of the network are chains, of what kind and ranks.

    Args:
        path: ``.onnx``, ``.xml`` (OpenVINO), ``.pt2``, or TorchScript.

    Raises:
        SurgeryValueError: the file holds no plan.
        OSError: it cannot be read.
    """
    file = as_path("path", path)
    reader = {".onnx": _onnx, ".xml": _openvino}.get(file.suffix, _archive)
    text = reader(file).get(PLAN)
    if text is None:
        raise SurgeryValueError(f"{file}: it holds no plan; only files that surgery exported do")
    try:
        return Plan.from_json(text)
    except SurgeryValueError as error:
        raise SurgeryValueError(f"{file}: {error}") from error


def _onnx(file: Path) -> Mapping[str, str]:
    from surgery.onnx_files.files import read_graph

    return {entry.key: entry.value for entry in read_graph(file).metadata_props}


def _openvino(file: Path) -> Mapping[str, str]:
    from xml.etree import ElementTree

    try:
        tree = ElementTree.parse(file)
    except ElementTree.ParseError as error:
        raise SurgeryValueError(f"{file}: no OpenVINO file ({error})") from error
    found = {key: tree.find(f"./rt_info/{key.replace('.', '/')}") for key in KEYS}
    return {key: element.get("value", "") for key, element in found.items() if element is not None}


def _archive(file: Path) -> Mapping[str, str]:
    """TorchScript files and exported programs are zip archives, with what was added to them under ``extra``."""
    from zipfile import ZipFile

    found = {}
    try:
        with ZipFile(file) as archive:
            for entry in archive.infolist():
                key = next((key for key in KEYS if entry.filename.endswith(f"extra/{key}")), None)
                if key is not None and entry.file_size > LONGEST:
                    raise ValueError(f"{key} claims to be of {entry.file_size:,} bytes")
                if key is not None:
                    found[key] = archive.read(entry).decode()
    except OSError:
        raise
    except Exception as error:  # zipfile, zlib and the decoders have no family of errors of their own
        raise SurgeryValueError(f"{file}: neither TorchScript nor an exported program ({error})") from error
    return found
