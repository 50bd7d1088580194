"""Where torchvision's compiled operators do not load, its Python code still works once the two it looks up at import are declared.

That happens with a wheel built for another build of torch (CUDA beside CPU). Only then are they declared, without any implementation: networks that
call them fail when they do, all others run. Where the real operators exist nothing is done.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch

from passes.errors import MissingExtra

__all__ = ["import_torchvision"]

DECLARATIONS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[torch.library.Library] = []  # declarations live as long as their library object


def import_torchvision() -> ModuleType:
    """The torchvision package.

    Raises:
        MissingExtra: it is not installed, or does not import for another reason than its operators.
    """
    import importlib.util

    if importlib.util.find_spec("torchvision") is None:
        raise MissingExtra.of("torchvision is not installed", "zoo")
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error) and "torchvision::qnms" not in str(error):
            raise MissingExtra(f"torchvision is installed but does not import: {error}") from error
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]  # what a failed import left behind
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for declaration in DECLARATIONS:
            if not hasattr(torch.ops.torchvision, declaration.partition("(")[0]):
                library.define(declaration)  # type: ignore[no-untyped-call]
        _libraries.append(library)
        import torchvision
    return torchvision  # type: ignore[no-any-return]
