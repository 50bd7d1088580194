"""The comparison that all other tests rely on must be able to fail."""

from __future__ import annotations

import enum

import numpy
import pytest
import torch

from passes.errors import ParityError, SurgeryTypeError
from passes.parity import TOLERANCE_EVAL, TOLERANCE_TRAIN, assert_parity, difference, private_inputs, tensors_in

X = torch.randn(4, 8, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros_like(X),
        X * 1.01,
        X[:, [1, 0, *range(2, 8)]],
        X + 1e-3,
        X.clone().index_fill_(2, torch.tensor([0]), float("nan")),
        X.clone().index_fill_(2, torch.tensor([0]), float("inf")),
        X[:2],
        -X,
        [X, X],
        [],
    ],
    ids=["zeros", "x1.01", "swapped channels", "shifted", "nan", "inf", "shorter", "negated", "two for one", "nothing"],
)
def test_it_fails(wrong):
    with pytest.raises(ParityError, match="differ"):
        assert_parity(wrong, X)


def test_it_passes_and_measures():
    assert assert_parity(X.clone(), X) == 0.0
    assert difference(X * (1 + 1e-3), X) == pytest.approx(1e-3, rel=1e-3)
    assert difference(torch.zeros(3), torch.zeros(3)) == 0.0
    assert difference(torch.full((3,), 1e-9), torch.zeros(3)) == float("inf")


def test_tolerance_follows_dtype_and_mode():
    assert_parity(X.double() * (1 + 1e-11), X.double())
    with pytest.raises(ParityError):
        assert_parity(X.double() * (1 + 1e-8), X.double())
    slightly = X * (1 + 5e-5)
    assert_parity(slightly, X, training=True)
    with pytest.raises(ParityError):
        assert_parity(slightly, X)
    assert [TOLERANCE_EVAL[d] for d in (torch.float64, torch.float32, torch.bfloat16)] == [1e-10, 1e-5, 3e-2]
    assert [TOLERANCE_TRAIN[d] for d in (torch.float64, torch.float32)] == [1e-10, 1e-4]
    for training, table in ((False, TOLERANCE_EVAL), (True, TOLERANCE_TRAIN)):
        for dtype, most in table.items():
            wanted = torch.ones(3, dtype=dtype)
            assert_parity(wanted.double() + 0.9 * most, wanted, training=training)
            with pytest.raises(ParityError):
                assert_parity(wanted.double() + 1.1 * most, wanted, training=training)


def test_special_values_must_stand_in_the_same_places():
    holes = X.clone()
    holes[0, 0, 0], holes[1, 1, 1] = float("nan"), float("-inf")
    assert difference(holes, holes.clone()) == 0.0
    other = holes.clone()
    other[1, 1, 1] = float("inf")
    assert difference(other, holes) == float("inf")
    assert difference(torch.tensor([float("inf"), 1.0]), torch.tensor([1.0, float("inf")])) == float("inf")
    assert difference(torch.empty(0, 3), torch.empty(0, 3)) == 0.0


def test_nested_outputs():
    assert difference({"a": X, "b": [X, (X,)]}, {"a": X, "b": [X, (X,)]}) == 0.0
    assert difference({"a": X, "b": [X, (X * 2,)]}, {"a": X, "b": [X, (X,)]}) > 0.1


def test_integers_are_compared_too():
    assert difference(torch.tensor([1, 2]), torch.tensor([1, 2])) == 0.0
    with pytest.raises(ParityError):
        assert_parity(torch.tensor([1, 3]), torch.tensor([1, 2]))


def test_private_inputs_do_not_share_storage():
    given = {"x": X.clone(), "n": 3}
    copied = private_inputs(given)
    copied["x"].zero_()
    assert given["x"].abs().sum() > 0
    assert copied["n"] == 3


def test_private_inputs_that_are_leaves_go_on_requiring_gradients():
    leaf = X.clone().requires_grad_()
    copied = private_inputs((leaf, leaf * 2, X))
    assert [(t.requires_grad, t.is_leaf) for t in copied] == [(True, True), (False, True), (False, True)]


def test_arrays_hold_no_tensors():
    assert [t is X for t in tensors_in([numpy.array(3.0), numpy.zeros((2, 2)), [X]])] == [True]


def test_inputs_that_cannot_be_copied_are_named():
    with pytest.raises(SurgeryTypeError, match="example_inputs: they cannot be copied"):
        private_inputs((X, __import__("threading").Lock()))


class Modes(enum.Flag):
    FAST = enum.auto()
    EXACT = enum.auto()


def test_flags_hold_no_tensors():
    x = torch.ones(2)
    assert list(tensors_in({"x": x, "mode": Modes.FAST | Modes.EXACT, "one": Modes.FAST})) == [x]
