"""Python kernels for the two compiled operators that torchvision's detectors call, for a benchmark's own process and where the real ones are absent.

Written for being right, not for speed.
"""

from __future__ import annotations

import sys
from math import ceil

import torch
from torch import Tensor

from surgery.zoo.torchvision_ops import import_torchvision

__all__ = ["nms", "provide_kernels", "roi_align"]

NMS = "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
ROI_ALIGN = (
    "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width, int sampling_ratio, bool aligned) -> Tensor"
)
_libraries: list[torch.library.Library] = []  # kernels live as long as their library object


def provide_kernels() -> None:
    """Import torchvision; where its compiled operators do not load, register the kernels below in their place for this process."""
    torchvision = import_torchvision()
    if torchvision.extension._has_ops() or _libraries:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    _libraries.append(library)
    for schema in (NMS, ROI_ALIGN):
        if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            library.define(schema)
    library.impl("nms", nms, "CompositeExplicitAutograd")
    library.impl("roi_align", roi_align, "CompositeImplicitAutograd")
    for name, module in list(sys.modules.items()):
        if name.startswith("torchvision.") and hasattr(module, "_has_ops"):
            module._has_ops = lambda: True


def nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes (N, 4: x1, y1, x2, y2) that no box of a higher score overlaps by more than the threshold, the highest score first."""
    order = scores.argsort(descending=True, stable=True)
    left_top, right_bottom = dets[order, :2], dets[order, 2:]
    areas = (right_bottom - left_top).prod(1)
    alive = torch.ones(len(order), dtype=torch.bool, device=dets.device)
    for i in range(len(order)):
        if alive[i]:
            sides = (torch.minimum(right_bottom[i], right_bottom[i + 1 :]) - torch.maximum(left_top[i], left_top[i + 1 :])).clamp(min=0)
            shared = sides.prod(1)
            alive[i + 1 :] &= shared <= iou_threshold * (areas[i] + areas[i + 1 :] - shared)
    return order[alive]


def roi_align(input: Tensor, rois: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int, sampling_ratio: int, aligned: bool) -> Tensor:
    """Means of bilinear samples in a grid of bins over each region (He et al. 2017, section 3).

    Args:
        input: (B, C, H, W).
        rois: (K, 5): index in the batch, then x1, y1, x2, y2 before ``spatial_scale``.
        spatial_scale: from the regions' pixels to the input's.
        pooled_height: rows of bins.
        pooled_width: columns of bins.
        sampling_ratio: samples a bin in each direction; 0 or less: as many as a bin has pixels.
        aligned: coordinates are those of pixel centres.

    Returns:
        (K, C, pooled_height, pooled_width).
    """
    shift = 0.5 if aligned else 0.0
    bins = []
    for roi in rois:
        x1, y1, x2, y2 = (roi[1:] * spatial_scale - shift).tolist()
        width, height = x2 - x1, y2 - y1
        if not aligned:
            width, height = max(width, 1.0), max(height, 1.0)
        rows = _positions(y1, height, pooled_height, sampling_ratio, input)
        columns = _positions(x1, width, pooled_width, sampling_ratio, input)
        samples = torch.einsum("ay,cyx,bx->cab", _weights(rows, input.shape[2]), input[int(roi[0])], _weights(columns, input.shape[3]))
        bins.append(samples.unflatten(2, (pooled_width, -1)).unflatten(1, (pooled_height, -1)).mean((2, 4)))
    return torch.stack(bins) if bins else input.new_zeros(0, input.shape[1], pooled_height, pooled_width)


def _positions(start: float, length: float, bins: int, ratio: int, like: Tensor) -> Tensor:
    """Where to sample along one side: as many positions in each bin."""
    count = max(ratio if ratio > 0 else ceil(length / bins), 1)
    return start + (torch.arange(bins * count, dtype=like.dtype, device=like.device) + 0.5) * (length / (bins * count))


def _weights(positions: Tensor, size: int) -> Tensor:
    """(positions, pixels): bilinear weights along one side; nothing beyond one pixel outside, the border's pixel up to there."""
    inside = ((positions >= -1) & (positions <= size)).to(positions.dtype)
    distance = (positions.clamp(0, size - 1)[:, None] - torch.arange(size, dtype=positions.dtype, device=positions.device)).abs()
    return (1 - distance).clamp(min=0) * inside[:, None]
