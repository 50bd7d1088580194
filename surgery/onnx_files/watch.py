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
from surgery.onnx_files.files import write_model

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["Watched", "watched"]


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
def watched(model: ModelProto, values: Sequence[str], *, external: bool) -> Iterator[Watched]:
    """A model that can be run and tells these values; the model is left as it is.

    Raises:
        SurgeryError: onnxruntime refuses it.
    """
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    given = {value.name for value in (*copy.graph.output, *copy.graph.input)}
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in values if name not in given)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "watched.onnx"
        write_model(copy, file, external=external)
        yield Watched(onnx_session(file))
