"""Values inside an ONNX file, seen by running it in onnxruntime with more outputs than it has."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from surgery.export.onnx import onnx_session, run_session
from surgery.onnx_files.feeds import Feed
from surgery.onnx_files.files import copied, write_model
from surgery.onnx_files.graph import tensor_dtype, true_inputs

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto

__all__ = ["Watched", "watched"]

DEFAULTS_SINCE = 4  # the version from which initializers may be given other numbers; before, onnxruntime passes over what it is given


class Watched:
    """A file that tells some of its values."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._names = [output.name for output in session.get_outputs()]

    def __call__(self, feed: Feed) -> dict[str, Tensor]:
        """The inputs, the outputs, and the values that were asked for, by name.

        Raises:
            SurgeryError: onnxruntime cannot compute with these inputs.
        """
        return dict(feed) | dict(zip(self._names, run_session(self._session, feed), strict=True))


@contextmanager
def watched(model: ModelProto, values: Sequence[str], *, external: bool, only: bool = False, loose: Sequence[str] = ()) -> Iterator[Watched]:
    """A model that can be run and tells these values; the model is left as it is.

    Args:
        model: of the file.
        values: names of values in the main graph.
        external: write weights in a file of their own.
        only: tell nothing else, and run no further than to the last of them.
        loose: constants of the main graph that may be given other numbers with the inputs.

    Raises:
        SurgeryError: onnxruntime refuses it.
    """
    import onnx

    copy = copied(model)
    if only:
        _stop_after(copy.graph, values)
    copy.ir_version = max(copy.ir_version, DEFAULTS_SINCE if loose else 0)
    _loosen(copy.graph, loose)
    _keep_tensors(copy.graph)
    given = {*(value.name for value in copy.graph.output), *true_inputs(copy.graph)}  # defaults of inputs are not told otherwise
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in values if name not in given)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "watched.onnx"
        write_model(copy, file, external=external)
        yield Watched(onnx_session(file))


def _stop_after(graph: GraphProto, values: Sequence[str]) -> None:
    """Leave out the nodes after those that make these values, which stand before them in every valid graph, and all outputs."""
    makers = [index for index, node in enumerate(graph.node) if not set(values).isdisjoint(node.output)]
    del graph.node[max(makers, default=-1) + 1 :]
    del graph.output[:]


def _keep_tensors(graph: GraphProto) -> None:
    """Leave out outputs that are no tensors of numbers (texts, sequences, maps), which nothing can be seen in."""
    kept = [output for output in graph.output if not output.type.WhichOneof("value") or tensor_dtype(output.type.tensor_type.elem_type) is not None]
    if kept:
        del graph.output[:]
        graph.output.extend(kept)


def _loosen(graph: GraphProto, names: Sequence[str]) -> None:
    """Make constants defaults of inputs."""
    import onnx

    nodes = [node for node in graph.node if node.op_type == "Constant" and node.output[0] in names]
    for node in nodes:
        tensor = next(attribute.t for attribute in node.attribute if attribute.name == "value")
        graph.initializer.add().CopyFrom(tensor)
        graph.initializer[-1].name = node.output[0]
        graph.node.remove(node)
    declared = {value.name for value in graph.input}
    for tensor in graph.initializer:
        if tensor.name in names and tensor.name not in declared:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
