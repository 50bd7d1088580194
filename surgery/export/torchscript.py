"""TorchScript: traced, saved, read back and compared with the network."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from passes.errors import SurgeryError
from passes.parity import private_inputs
from passes.running import arguments, kept_random_states
from surgery.export.common import ExportReport, check_network, installed, network_to_export, quiet, tensors_or_error, total_size

__all__ = ["export_torchscript"]


@kept_random_states()
def export_torchscript(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    check: bool = True,
) -> ExportReport:
    """Write a model as TorchScript (by tracing) and prove that the file, read back, computes the same.

    The model is exported in eval mode, from a copy. Nothing is left behind if the export or the check fails.

    Args:
        model: plain, decomposed or reconstructed module, or a ``GraphModule``.
        path: file to write.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        check: compare on fresh random inputs.

    Raises:
        ParityError: the file computes something else.
        SurgeryError: torch cannot trace the model; its error is the cause.
        OSError: the file cannot be written.
    """
    network, target = network_to_export(model, path, example_inputs)
    tensors_or_error(example_inputs)
    args, kwargs = arguments(private_inputs(example_inputs))
    with installed(target) as work:
        try:
            with quiet(), torch.no_grad():
                script: Any = torch.jit.trace(  # type: ignore[no-untyped-call]
                    network, args or None, example_kwarg_inputs=kwargs or None, check_trace=False, strict=False
                )
                torch.jit.save(script, str(work))
        except OSError:
            raise
        except Exception as error:  # tracing runs the model's own code and wraps all kinds of errors
            raise SurgeryError(f"torch cannot trace {type(model).__name__} to TorchScript: {type(error).__name__}: {error}") from error
        difference: float | None = None
        sizes: tuple[int, ...] = ()
        if check:
            with quiet():
                loaded = torch.jit.load(str(work))  # type: ignore[no-untyped-call]

            def call(inputs: Any) -> Any:
                loaded_args, loaded_kwargs = arguments(inputs)
                with torch.no_grad():
                    return loaded(*loaded_args, **loaded_kwargs)

            difference, sizes = check_network(network, call, example_inputs, (None,), "the TorchScript file and the network")
        return ExportReport(path=str(target), format="torchscript", size_bytes=total_size(work), difference=difference, batch_sizes=sizes)
