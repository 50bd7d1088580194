"""ONNX files in and out: read whole, written whole or not at all, refused where they are none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from passes.errors import SurgeryError, SurgeryValueError
from passes.running import first_line
from surgery.files import as_path

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, TensorProto

__all__ = ["check_valid", "copied", "data_files", "has_external_data", "move_out", "open_model", "read_graph", "without_functions", "write_model"]

LARGEST = 2**31 - 2**20  # bytes that a message of protobuf can hold, with room for its frame
SMALLEST = 1024  # bytes of a weight that is worth a place in another file


def open_model(path: str | os.PathLike[str]) -> ModelProto:
    """The model in a file, the data in files beside it included.

    Raises:
        SurgeryValueError: it is no ONNX file, or data that it names are not there.
        OSError: it cannot be read.
    """
    import onnx

    file = as_path("path", path)
    model = without_functions(read_graph(file))  # before the data come, with which it may be more than protobuf writes
    try:
        onnx.load_external_data_for_model(model, str(file.parent))
    except (onnx.checker.ValidationError, OSError, ValueError) as error:
        raise SurgeryValueError(f"{file}: the data that it keeps in other files cannot be read ({error}); put them beside it") from error
    return model


def without_functions(model: ModelProto) -> ModelProto:
    """The model with the functions of its own put where they are called, where there are layers in them; else as it is."""
    if not any(_has_layers(function.node) for function in model.functions):
        return model
    from onnx import inliner

    return inliner.inline_local_functions(model)


def read_graph(file: Path) -> ModelProto:
    """The model in a file, without weights that lie in files beside it.

    Raises:
        SurgeryValueError: it is no ONNX file.
        OSError: it cannot be read.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(file), format="protobuf", load_external_data=False)
    except DecodeError as error:
        raise SurgeryValueError(f"{file}: no ONNX file ({first_line(error)})") from error
    if not model.graph.node or not model.opset_import:
        raise SurgeryValueError(f"{file}: no ONNX file, or one without a graph")
    return model


def copied(model: ModelProto) -> ModelProto:
    """A model of its own with the same content."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def _has_layers(nodes: object) -> bool:
    from surgery.onnx_files.nodes import LAYERS

    return any(node.op_type in LAYERS for node in nodes)  # type: ignore[attr-defined]


def has_external_data(path: str | os.PathLike[str]) -> bool:
    """Whether a file keeps weights in others."""
    return bool(data_files(path))


def data_files(path: str | os.PathLike[str]) -> set[Path]:
    """The files beside it in which a file keeps weights, links followed."""
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    file = Path(path).absolute()
    names = {ExternalDataInfo(tensor).location for tensor in _initializers(read_graph(file).graph) if uses_external_data(tensor)}
    return {(file.parent / name).resolve() for name in names}


def write_model(model: ModelProto, file: Path, *, external: bool, data: str | None = None) -> None:
    """Write a model, with its weights in a second file beside it, named ``data``, where that is asked for or needed."""
    import onnx

    if external or model.ByteSize() > LARGEST:
        move_out(model, data or f"{file.name}.data")
    onnx.save(model, str(file), format="protobuf")


def move_out(model: ModelProto, location: str) -> None:
    """Mark the weights of a model to be written into a file beside its own when it is saved.

    What onnx has for it refuses a name that exists in the current directory, wherever the file is going to be.
    """
    from onnx.external_data_helper import set_external_data

    for tensor in _initializers(model.graph):
        if len(tensor.raw_data) >= SMALLEST:
            set_external_data(tensor, location)


def _initializers(graph: GraphProto) -> Iterator[TensorProto]:
    """Those of a graph and of the graphs in its nodes."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _initializers(inner)


def check_valid(file: Path, source: Path) -> None:
    """Refuse a file that ``onnx.checker`` refuses, unless it refuses the one that it was made from as well.

    Raises:
        SurgeryError: the file is not valid, while the source is.
    """
    refusal = _refusal(file)
    if refusal is not None and _refusal(source) is None:
        raise SurgeryError(f"{source}: the network that was made of it is not valid ONNX: {refusal}; check=False writes it unchecked")


def _refusal(file: Path) -> str | None:
    import onnx

    try:
        onnx.checker.check_model(str(file))
    except onnx.checker.ValidationError as error:
        return str(error).strip().splitlines()[0]
    return None
