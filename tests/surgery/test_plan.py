"""Plans: deterministic JSON, errors that name what is wrong, differences."""

from __future__ import annotations

import contextlib
import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passes.errors import SurgeryError, SurgeryTypeError, SurgeryValueError
from surgery import SVD, Keep, Plan, Tucker

ranks = st.integers(1, 4096)
decisions = st.one_of(
    st.builds(Tucker, ranks, ranks),
    st.builds(Tucker, st.none(), ranks),
    st.builds(Tucker, ranks, st.none()),
    st.builds(SVD, ranks),
    st.builds(Keep, st.text(min_size=1)),
)
plans = st.dictionaries(st.text(), decisions, max_size=6).map(Plan)

PLAN = Plan({"conv1": Tucker(8, 4), "mix": SVD(3), "head": Keep("linear")})


@given(plans)
def test_json_round_trip(plan):
    text = plan.to_json()
    again = Plan.from_json(text)
    assert again == plan
    assert list(again) == list(plan)
    assert again.to_json() == text


def test_the_text_is_as_documented(golden):
    golden("plan.json", PLAN.to_json())


@given(plans, plans)
def test_diff(left, right):
    changes = left.diff(right)
    assert {c.site for c in changes} == {n for n in {*left, *right} if left.get(n) != right.get(n)}
    assert left.diff(left) == ()
    patched = Plan(left)
    for change in changes:
        if change.after is None:
            del patched[change.site]
        else:
            patched[change.site] = change.after
    assert dict(patched) == dict(right)


def test_diff_reads_well():
    other = Plan(PLAN)
    other["mix"] = SVD(5)
    assert [str(c) for c in PLAN.diff(other)] == ["mix: SVD(rank=3) -> SVD(rank=5)"]


def test_it_is_edited_like_a_dict_and_checked():
    plan = Plan(PLAN)
    plan["conv1"] = Tucker(None, 4)
    assert PLAN["conv1"] == Tucker(8, 4)
    assert repr(plan) == "Plan(2 of 3 layers cut)"
    assert "conv1" in str(plan)
    with pytest.raises(SurgeryTypeError, match="'conv1' must get a factorization or Keep"):
        plan["conv1"] = (8, 4)
    with pytest.raises(SurgeryTypeError, match="layer names are strings"):
        plan[3] = SVD(1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "expected an object"),
        ("{}", "surgery.plan"),
        ('{"format": "surgery.plan", "version": 2, "sites": {}}', "version 2"),
        ('{"format": "surgery.plan", "version": 1}', "sites"),
        ('{"format": "surgery.plan", "version": 1, "sites": []}', "sites"),
        ('{"format": "surgery.plan", "version": 1, "sites": {}, "more": 1}', "more"),
        ('{"format": "surgery.plan", "version": 1, "sites": {"a": {"kind": "tucker", "rank_out": 1}}}', "layer 'a': .*rank_in"),
        ('{"format": "surgery.plan", "version": 1, "sites": {"a": {"kind": "svd", "rank": 0}}}', "layer 'a': SVD: rank must be at least 1"),
        ('{"format": "surgery.plan", "version": 1, "sites": {"a": {"kind": "magic"}}}', "layer 'a': unknown kind"),
        ('{"format": "surgery.plan", "version": 1, "sites": {"a": null}}', "layer 'a'"),
        ('{"format": "surgery.plan", "version": 1, "sites": {"a": {"kind": "svd", "rank": 1}, "a": {"kind": "svd", "rank": 2}}}', "twice"),
    ],
)
def test_wrong_texts_are_told_apart(text, message, tmp_path):
    with pytest.raises(SurgeryValueError, match=message):
        Plan.from_json(text)
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(SurgeryValueError, match=r"plan\.json"):
        Plan.load(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["kind", "rank", "rank_out", "rank_in", "reason", "a"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.one_of(
        st.binary(max_size=60),
        json_values.map(lambda v: json.dumps(v).encode()),
        json_values.map(lambda v: json.dumps({"format": "surgery.plan", "version": 1, "sites": {"a": v}}).encode()),
    )
)
def test_no_text_gives_anything_but_a_plan_or_our_error(text):
    with contextlib.suppress(SurgeryError):
        assert isinstance(Plan.from_json(text), Plan)


def test_saving_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    PLAN.save(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        Plan().save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    with pytest.raises(OSError, match="nowhere"):
        PLAN.save(tmp_path / "nowhere" / "plan.json")
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "absent.json")


def test_a_copy_is_a_plan_of_its_own():
    plan = Plan({"conv1": Tucker(8, 4), "conv2": SVD(3)})
    other = copy.copy(plan)
    other["conv1"] = Keep("mine")
    assert plan["conv1"] == Tucker(8, 4)
    assert [change.site for change in plan.diff(other)] == ["conv1"]
    assert (other.latency, other.trials) == (plan.latency, plan.trials)
