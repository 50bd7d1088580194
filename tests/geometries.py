"""Random layers for property tests: every geometry that some kind accepts, and what goes with it."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}


@st.composite
def layers(draw: st.DrawFn, *, pointwise: bool | None = None) -> tuple[nn.Module, Tensor]:
    """A convolution (1d, 2d, 3d; grouped, transposed) or linear layer with an input that it accepts, in float64."""
    dims = draw(st.integers(0, 3))
    out, into = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    bias = draw(st.booleans())
    seed = draw(st.integers(0, 2**20))
    torch.manual_seed(seed)
    if dims == 0 and pointwise is not False:
        return nn.Linear(into, out, bias, dtype=torch.float64), torch.randn(3, into, dtype=torch.float64)
    dims = max(dims, 1)
    one = draw(st.booleans()) if pointwise is None else pointwise
    kernel = (1,) * dims if one else draw(st.tuples(*[st.integers(1, 4)] * dims).filter(lambda k: any(n > 1 for n in k)))
    stride = draw(st.tuples(*[st.integers(1, 3)] * dims))
    dilation = draw(st.tuples(*[st.integers(1, 2)] * dims))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    out, into = (out, into) if groups == 1 else (groups * (1 + out // 3), groups * (1 + into // 3))
    if draw(st.integers(0, 3)) == 0:
        return draw(_transposed(dims, into, out, kernel, stride, dilation, groups, bias))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding: str | tuple[int, ...] = draw(st.tuples(*[st.integers(0, 2)] * dims))
    word = draw(st.sampled_from(["", "same", "valid"]))
    if word:
        padding = word
        stride = (1,) * dims if word == "same" else stride
    conv = CONVS[dims](into, out, kernel, stride, padding, dilation, groups, bias, mode, dtype=torch.float64)
    size = [draw(st.integers(d * (k - 1) + 3, d * (k - 1) + 6)) for k, d in zip(kernel, dilation, strict=True)]
    inputs = torch.randn(2, into, *size, dtype=torch.float64)
    if draw(st.booleans()) and dims in FORMATS:
        conv = conv.to(memory_format=FORMATS[dims])
        inputs = inputs.contiguous(memory_format=FORMATS[dims])
    return conv, inputs


@st.composite
def _transposed(draw, dims, into, out, kernel, stride, dilation, groups, bias) -> tuple[nn.Module, Tensor]:
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    padding = tuple(draw(st.integers(0, min(2, d * (k - 1)))) for k, d in zip(kernel, dilation, strict=True))
    conv = TRANSPOSED[dims](into, out, kernel, stride, padding, extra, groups, bias, dilation, dtype=torch.float64)
    return conv, torch.randn(2, into, *draw(st.tuples(*[st.integers(3, 5)] * dims)), dtype=torch.float64)
