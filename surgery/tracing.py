"""``trace`` and ``capture``: a model as a graph, with all that is known of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

import passes
from surgery.inspection import usable_model
from surgery.progress import stage
from surgery.record import whole_record, write_record

__all__ = ["capture", "trace"]


def trace(model: nn.Module, example_inputs: Any) -> fx.GraphModule:
    """The model as a flat ``GraphModule`` with weights of its own, in the mode (train or eval) that it is in.

    Every convolution and linear layer is a node, a chain is one node for each of its layers, and every node knows its shape
    (``meta["tensor_meta"]``). The graph comes from symbolic tracing and is returned only if it computes what the model computes, in two calls in
    a row: on the example inputs, then on other numbers. ``decompose``, ``reconstruct`` and ``report`` take it like any model, and know of the surgery
    that the model already had.

    Args:
        model: any module but a single layer.
        example_inputs: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.

    Raises:
        SurgeryError: the model cannot be traced, or its trace computes something else; the message says why.
        SurgeryTypeError: the model is wrapped, or is itself a layer or a chain; it or the inputs cannot be copied.
        SurgeryValueError: it does not accept the inputs; it or they hold no numbers.
    """
    usable_model(model)
    with torch.inference_mode(False), stage("tracing"):
        traced = passes.trace(model, example_inputs)
    record = whole_record(model)
    if record is not None:
        write_record(traced, record)
    return traced


def capture(model: nn.Module, example_inputs: Any) -> fx.Graph:
    """The model as an ``fx.Graph`` whose nodes know their shapes, in the mode (train or eval) that it is in; any model that runs.

    It is the graph of ``trace`` where that succeeds. Where it fails (control flow on data, a trace that computes something else), one real forward
    pass is recorded, and the graph is a ``RecordedGraph``: one execution, good for shapes, calls, drawing and finding neighbours, never a licence to
    fuse.

    Args:
        model: any module but a single layer.
        example_inputs: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.

    Raises:
        SurgeryTypeError: the model is wrapped, or is itself a layer or a chain; it or the inputs cannot be copied.
        SurgeryValueError: it does not accept the inputs; it or they hold no numbers.
    """
    usable_model(model)
    with torch.inference_mode(False), stage("capturing"):
        return passes.capture(model, example_inputs)
