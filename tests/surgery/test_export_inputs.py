"""What a file takes: names, structures filled anew, fresh inputs, and which dimensions can be open."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import MutableMapping
from dataclasses import dataclass
from types import MappingProxyType

import pytest
import torch
from torch import Tensor, fx, nn

import surgery
from passes.errors import SurgeryTypeError, SurgeryValueError
from passes.parity import tensors_in
from surgery.export.inputs import Flat, filled, fresh_inputs, input_names, openings
from tests.networks import Keyword, Small

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(51))
Point = namedtuple("Point", "x y")


@dataclass
class Sample:
    picture: Tensor
    label: int = 0


STRUCTURE = ({"b": [X, 3], "a": OrderedDict(z=X + 1)}, Point(X + 2, None), Sample(X + 3, 5))


def test_structures_are_filled_in_the_order_of_their_tensors():
    before = list(tensors_in(STRUCTURE))
    marks = filled(STRUCTURE, iter("klmn"), lambda value: ("rest", value))
    assert marks[0] == {"b": ["k", ("rest", 3)], "a": OrderedDict(z="l")}
    assert isinstance(marks[0]["a"], OrderedDict)
    assert marks[1] == Point("m", ("rest", None))
    assert marks[2] == Sample("n", ("rest", 5))
    assert all(a is b for a, b in zip(tensors_in(STRUCTURE), before, strict=True))
    assert all(a is b for a, b in zip(tensors_in(filled(STRUCTURE, iter(before))), before, strict=True))


def test_a_container_that_cannot_be_filled_is_named():
    class Bag:
        def __iter__(self):
            return iter([X])

    with pytest.raises(SurgeryTypeError, match="a Bag holds tensors; a file takes tensors in tuples, lists, mappings that can be changed"):
        filled((Bag(),), iter([X]))


class Batch(MutableMapping):
    """A mapping whose shallow copies keep their entries in the same place."""

    def __init__(self, **entries):
        self.entries = entries

    def __getitem__(self, key):
        return self.entries[key]

    def __setitem__(self, key, value):
        self.entries[key] = value

    def __delitem__(self, key):
        del self.entries[key]

    def __iter__(self):
        return iter(self.entries)

    def __len__(self):
        return len(self.entries)


def test_mappings_of_ones_own_are_left_alone():
    mine = Batch(sound=X, label=3)
    made = filled(mine, iter(["other"]))
    assert isinstance(made, Batch)
    assert made.entries == {"sound": "other", "label": 3}
    assert mine.entries == {"sound": X, "label": 3}
    with pytest.raises(SurgeryTypeError, match=r"a mappingproxy holds tensors; .*mappings that can be changed"):
        filled(MappingProxyType({"sound": X}), iter(["other"]))


def test_names_are_those_of_forward_with_the_way_inside():
    class Model(nn.Module):
        def forward(self, pair, point, *rest, sample=None):
            return 0

    assert input_names(Model(), STRUCTURE) == ("pair_b_0", "pair_a_z", "point_x", "rest_2_picture")
    assert input_names(Model(), {"sample": X, "pair": {"b": X}}) == ("sample", "pair_b")
    assert input_names(Model(), ({"b": X}, X, X, X)) == ("pair_b", "point", "rest_2", "rest_3")
    assert input_names(surgery.trace(Small().eval(), X), X) == ("x",)
    assert input_names(Model(), ({"b_0": X, "b": [X]},)) == ("pair_b_0", "pair_b_0_2")


def test_one_tensor_given_twice_is_two_inputs():
    class Difference(nn.Module):
        def forward(self, a, b):
            return a - 2 * b

    flat = Flat(Difference(), (X, X))
    assert torch.equal(flat(X, X + 1)[0], X - 2 * (X + 1))


def test_fresh_inputs_have_the_shape_and_dtype_and_are_not_the_example():
    inputs = {"picture": X, "ids": torch.tensor([[3, 7, 9], [3, 7, 9]]), "flag": True, "scale": torch.ones(1)}
    fresh = fresh_inputs(inputs, torch.Generator().manual_seed(0), batch=5)
    assert fresh["picture"].shape == (5, 3, 12, 12)
    assert fresh["ids"].shape == (5, 3)
    assert set(fresh["ids"].flatten().tolist()) <= {3, 7, 9}
    assert fresh["flag"] is True
    assert fresh["scale"].shape == (1,)  # has no batch
    assert not torch.equal(fresh["picture"][:2], X)
    last = fresh_inputs(X.half().to(memory_format=torch.channels_last), torch.Generator(), batch=1)
    assert last.dtype == torch.half
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert set(fresh_inputs(X, torch.Generator(), noise=False).flatten().tolist()) <= set(X.flatten().tolist())


def opened(model, inputs, batch=False, size=False):
    return openings(model, inputs, input_names(model, inputs), dynamic_batch=batch, dynamic_size=size)


def test_nothing_is_open_unless_asked_for():
    found = opened(Small().eval(), X)
    assert found.dims == ({},)
    assert found.exported == found.checked[0] == ((2, 3, 12, 12),)
    assert len(found.checked) == 1


def test_a_batch_of_one_is_exported_with_two_entries():
    found = opened(Small().eval(), X[:1], batch=True)
    assert found.dims == ({0: "batch"},)
    assert found.exported == ((2, 3, 12, 12),)
    assert found.checked == (((3, 3, 12, 12),), ((1, 3, 12, 12),))


def test_a_size_of_one_is_exported_with_more_entries():
    """Torch takes a dimension of one for fixed."""
    words = torch.zeros(1, 1, dtype=torch.long)
    found = opened(nn.Embedding(10, 4), words, size={"input": [1]})
    ((batch, length),) = found.exported
    assert (batch, length > 1) == (1, True)
    assert found.checked == (((1, 1),), found.exported)
    found = opened(nn.Embedding(10, 4), words, batch=True, size={"input": [1]})
    assert found.exported == ((2, length),)
    assert found.checked == (((3, 1),), ((1, length),))


def test_inputs_without_the_batch_keep_their_shapes():
    found = opened(Keyword().eval(), {"sound": torch.randn(2, 4, 20), "gain": torch.ones(1)}, batch=True, size=True)
    assert found.dims == ({0: "batch", 2: "length"}, {})
    assert [shapes[1] for shapes in found.checked] == [(1,), (1,)]


class Joined(nn.Module):
    """One input of which no size can change, and one of which two can."""

    def __init__(self):
        super().__init__()
        self.linear, self.conv = nn.Linear(6, 4), nn.Conv2d(3, 4, 3)

    def forward(self, words, picture):
        return self.conv(picture) + self.linear(words).mean(1)[..., None, None]


def test_sizes_are_open_where_the_network_takes_others():
    inputs = (torch.randn(2, 5, 6), X)
    found = opened(Joined().eval(), inputs, size=True)
    assert found.dims == ({}, {2: "height", 3: "width"})
    found = opened(Joined().eval(), inputs, batch=True, size={"words": [1], "picture": [3]})
    assert found.dims == ({0: "batch", 1: "words_size_1"}, {0: "batch", 3: "picture_width"})
    (words, picture) = found.checked[1]
    assert (words[0], picture[0], words[2], picture[2]) == (1, 1, 6, 12)
    assert words[1] != 5
    assert picture[3] != 12
    with pytest.raises(SurgeryValueError, match=r"takes no other size than that of the example inputs \(RuntimeError: .*name them"):
        opened(Joined().eval(), inputs, size={"words": [2]})
    with pytest.raises(SurgeryValueError, match="no input has a third dimension"):
        opened(nn.Linear(6, 4), torch.randn(2, 6), size=True)
    with pytest.raises(SurgeryValueError, match="no example input has a dimension that could be open"):
        opened(nn.Identity(), torch.tensor(1.0), batch=True)


def test_graph_modules_have_names_too():
    graph = fx.symbolic_trace(Joined())
    assert input_names(graph, (torch.randn(2, 5, 6), X)) == ("words", "picture")
