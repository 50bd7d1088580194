"""``benchmarks/int8.py`` quantizes what it says, to something close."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import surgery
from surgery.export.onnx import onnx_session, run_session

pytest.importorskip("onnxruntime")
sys.path.insert(1, str(Path(__file__).parents[2] / "benchmarks"))

import int8


def test_a_quantized_file_holds_bytes_and_computes_nearly_the_same(tmp_path):
    import onnx

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()
    net = surgery.decompose(net, {"2": (8, 8)}, example_inputs=torch.randn(1, 3, 12, 12))
    batches = [torch.randn(8, 3, 12, 12) for _ in range(4)]
    surgery.export_onnx(net, tmp_path / "float.onnx", batches[0], dynamic_batch=True, exporter="torchscript", check=False)
    int8.quantize(tmp_path / "float.onnx", tmp_path / "int8.onnx", batches)
    graph = onnx.load(str(tmp_path / "int8.onnx")).graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    assert sum(node.op_type == "Conv" for node in graph.node) == 4
    assert sum(tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4 for tensor in weights.values()) == 4
    got = run_session(onnx_session(tmp_path / "int8.onnx"), batches[0])[0]
    with torch.no_grad():
        expected = net(batches[0])
    gap = (got - expected).abs().max() / expected.abs().max()
    assert 0 < gap < 0.1


def test_top1_counts_hits(tmp_path):
    class First(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :3] * 1.0

    surgery.export_onnx(First(), tmp_path / "first.onnx", torch.randn(2, 3, 2, 2), dynamic_batch=True, exporter="torchscript", check=False)
    images = torch.zeros(4, 3, 2, 2)
    images[:, 0, 0, 1] = 1  # the second number is the largest
    assert int8.top1(tmp_path / "first.onnx", "onnxruntime", images, torch.tensor([1, 1, 0, 1]), 1) == 75.0


def test_the_table_holds_every_row():
    row = {"network": "resnet20", "share": 0.5, "numbers": "int8", "runtime": "onnxruntime", "threads": 1, "load_average": 0.2, "top1": 90.5}
    row |= {"adds_in_32_bits": False}
    row |= {"environment": {"torch": "2"}, "time_ratio": 1.5, "spread": 0.1, "verdict": "faster", "file_bytes_before": 400, "file_bytes_after": 100}
    told = int8.markdown([row])
    assert "| resnet20 | 0.5 | int8 | 90.50 | 1.50 ± 0.10 | faster | 4.00 |" in told
    assert "weights seven" in told
    assert "weights eight or seven" in int8.markdown([row | {"adds_in_32_bits": True}, row])
