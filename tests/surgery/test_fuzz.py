"""Files that somebody has damaged, or made to do harm: an error of ours or of the file system, nothing else, soon, and no code is run.

``SURGERY_LONG=1`` draws many more of them.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile

import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import surgery
from surgery.checkpoint import PLAN_FILE, WEIGHTS_FILE
from surgery.cost.profile import Entry, Profile, TimedShape, read_shapes
from surgery.zoo import load_weights

EXPECTED = (surgery.SurgeryError, OSError)
NUMBERS = st.one_of(st.integers(), st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**400, 1e308, float("nan"), float("inf"), -0.0]), st.floats())
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8), st.sampled_from(["tucker", "svd", "keep", "re:.*", "\ud800", "\0", "ﬁ"]))
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=8)


class Net(nn.Module):
    """Two convolutions and a linear layer, cut to be saved."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.again, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.again(self.conv(x)).mean((2, 3)))


def places(data, way=()):
    """The ways to all parts of nested lists and dicts."""
    yield way
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield from places(value, (*way, key))


def changed(data, way, change):
    """A copy with ``change(container, key)`` made at a place."""
    if not way:
        box = [data]
        change(box, 0)
        return box[0] if box else None
    made = json.loads(json.dumps(data))
    inner = made
    for key in way[:-1]:
        inner = inner[key]
    change(inner, way[-1])
    return made


@st.composite
def damaged_json(draw, data):
    """A text like that of ``data``, with something else, more, less, twice or far too deep somewhere in it; or with other bytes."""
    for _ in range(draw(st.integers(1, 2))):
        way, value = draw(st.sampled_from(list(places(data)))), draw(JSON)
        how = draw(st.sampled_from(["put", "drop", "add"]))
        if how == "put":
            data = changed(data, way, lambda box, key: box.__setitem__(key, value))  # noqa: B023
        elif how == "drop":
            data = changed(data, way, lambda box, key: box.__delitem__(key))
        elif isinstance(data, dict):
            data = {**data, draw(st.text(max_size=6)): value}
    text = json.dumps(data)
    how = draw(st.sampled_from(["", "", "", "twice", "deep", "bytes", "end"]))
    if how == "twice" and text.startswith("{") and len(text) > 2:
        text = text[:-1] + ", " + text[1:]
    if how == "deep":
        text = text.replace("{", '{"a":' + "[" * 5000, 1)
    content = text.encode("utf-8", "surrogatepass")
    return draw(damaged_bytes(content)) if how == "bytes" else content[: draw(st.integers(0, len(content)))] if how == "end" else content


@st.composite
def damaged_bytes(draw, content):
    """The same with a few bytes replaced, put in or taken out, mostly near the beginning, where sizes and types are."""
    made = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.one_of(st.integers(0, min(64, len(made))), st.integers(0, len(made))))
        made[start : start + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(made)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "net"
    torch.manual_seed(0)
    surgery.save(surgery.decompose(Net(), 0.5, example_inputs=torch.randn(1, 3, 8, 8)), folder)
    return folder


def tried(action):
    """What it gives, or None where it says what is wrong."""
    try:
        return action()
    except EXPECTED:
        return None


PLAN = json.loads(surgery.plan(Net(), {"conv": (4, 2), "again": surgery.Spatial(3), "head": 2}).to_json())


@given(damaged_json(PLAN))
def test_plans(content):
    plan = tried(lambda: surgery.Plan.from_json(content))
    if plan is not None:
        net = tried(lambda: surgery.decompose(Net(), plan))
        assert net is None or net(torch.zeros(1, 3, 8, 8)).shape == (1, 4)
        json.loads(plan.to_json())


@given(data=st.data())
def test_plans_of_checkpoints(saved, data):
    good = (saved / PLAN_FILE).read_bytes()
    (saved / PLAN_FILE).write_bytes(data.draw(damaged_json(json.loads(good))))
    try:
        tried(lambda: surgery.load(saved, Net()))
    finally:
        (saved / PLAN_FILE).write_bytes(good)


def with_header(content, header, size=None):
    """Safetensors bytes with another header, whose size may be a lie."""
    old = 8 + struct.unpack("<Q", content[:8])[0]
    return struct.pack("<Q", len(header) if size is None else size) + header + content[old:]


@st.composite
def damaged_weights(draw, content):
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    how = draw(st.sampled_from(["header", "record", "size", "bytes", "end", "offsets"]))
    if how == "header":
        return with_header(content, draw(damaged_json(header)))
    if how == "record":
        record = draw(damaged_json(json.loads(header["__metadata__"]["surgery"]))).decode("utf-8", "replace")
        return with_header(content, json.dumps({**header, "__metadata__": {"surgery": record}}).encode())
    if how == "size":
        return with_header(content, json.dumps(header).encode(), draw(st.integers(0, 2**64 - 1)))
    if how == "offsets":
        name = draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
        other = {
            "data_offsets": draw(st.lists(st.integers(0, 2**63), min_size=2, max_size=2)),
            "shape": draw(st.lists(st.integers(0, 2**40), max_size=4)),
        }
        other["dtype"] = draw(st.sampled_from(["F32", "F64", "I8", "BOOL", "F8_E4M3", "U64", "X1"]))
        some = draw(st.sets(st.sampled_from(sorted(other)), min_size=1))
        return with_header(content, json.dumps({**header, name: {**header[name], **{key: other[key] for key in some}}}).encode())
    return draw(damaged_bytes(content)) if how == "bytes" else content[: draw(st.integers(0, len(content)))]


@given(data=st.data())
def test_weights_of_checkpoints(saved, data):
    good = (saved / WEIGHTS_FILE).read_bytes()
    (saved / WEIGHTS_FILE).write_bytes(data.draw(damaged_weights(good)))
    try:
        net = tried(lambda: surgery.load(saved, Net()))
        if net is not None:
            assert net(torch.zeros(1, 3, 8, 8)).shape == (1, 4)
            assert str(surgery.report(net))
            surgery.report(net).to_json()
    finally:
        (saved / WEIGHTS_FILE).write_bytes(good)


def onnx_bytes(text):
    graph = onnx.helper.make_graph([], "empty", [], [])
    model = onnx.helper.make_model(graph)
    onnx.helper.set_model_props(model, {"surgery.plan": text})
    return model.SerializeToString()


def archive_bytes(text, method=zipfile.ZIP_DEFLATED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        archive.writestr("net/extra/surgery.plan", text)
    return stream.getvalue()


WRITERS = {
    "net.onnx": onnx_bytes,
    "net.pt": archive_bytes,
    "net.xml": lambda text: f'<net><rt_info><surgery><plan value="{len(text)}" /></surgery></rt_info></net>'.encode(),
}


@pytest.mark.parametrize("name", WRITERS)
@given(data=st.data())
def test_plans_in_exported_files(name, tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / name
    text = data.draw(st.one_of(st.just(json.dumps(PLAN)), damaged_json(PLAN).map(lambda content: content.decode("utf-8", "replace"))))
    content = WRITERS[name](text.replace("\0", ""))
    file.write_bytes(data.draw(st.one_of(st.just(content), damaged_bytes(content))))
    tried(lambda: surgery.exported_plan(file))


SHAPE = {
    "layers": [
        {"in_channels": 8, "out_channels": 8, "kernel": [3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}
        | {"padding_mode": "zeros", "transposed": False, "output_padding": [0, 0]}
    ],
    "input_shape": [1, 8, 8, 8],
    "dtype": "float32",
    "channels_last": False,
}
PROFILE = json.loads(Profile({"runtime": "eager"}, 1.0, {TimedShape.from_data(SHAPE).key: Entry(0.5)}).to_json())


@given(damaged_json(PROFILE))
def test_profiles(content):
    profile = tried(lambda: Profile.from_json(content))
    if profile is not None:
        json.loads(profile.to_json())


@given(data=st.data())
def test_lists_of_shapes(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "shapes.json"
    file.write_bytes(data.draw(damaged_json({"format": "surgery.shapes", "version": 1, "shapes": {"one": SHAPE}})))
    for shape in tried(lambda: read_shapes(file)) or ():
        assert shape.macs >= 0


def state_of_a_schedule():
    torch.manual_seed(0)
    schedule = surgery.DecompositionSchedule(0, ranks=0.5)
    schedule.step(0, Net())
    return json.loads(json.dumps(schedule.state_dict()))


STATE = state_of_a_schedule()


@given(damaged_json(STATE))
def test_states_of_schedules(text):
    try:
        state = json.loads(text)
    except (ValueError, RecursionError):
        return
    tried(lambda: surgery.DecompositionSchedule(0, ranks=0.5).load_state_dict(state, Net()))


@given(data=st.data())
def test_state_dicts(tmp_path_factory, data):
    stream = io.BytesIO()
    torch.save(Net().state_dict(), stream)
    file = tmp_path_factory.getbasetemp() / "weights.pt"
    file.write_bytes(data.draw(damaged_bytes(stream.getvalue())))
    tried(lambda: load_weights(Net(), file))


class Harm:
    """What a pickle can hold: a call."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_no_code_in_a_file_is_run(suffix, tmp_path):
    harm, file = tmp_path / "harm", tmp_path / f"weights{suffix}"
    for content in (pickle.dumps({"conv.weight": Harm(harm)}), archive_bytes(pickle.dumps(Harm(harm)))):
        file.write_bytes(content)
        with pytest.raises(surgery.SurgeryValueError):
            load_weights(Net(), file)
    torch.save({"conv.weight": Harm(harm)}, file)
    with pytest.raises(surgery.SurgeryValueError):
        load_weights(Net(), file)
    assert not harm.exists()


def test_a_bomb_is_not_unpacked(tmp_path):
    file = tmp_path / "net.pt2"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("net/extra/surgery.plan", "w", force_zip64=True) as entry:
        for _ in range(72):
            entry.write(bytes(1 << 20))
    with pytest.raises(surgery.SurgeryValueError, match="claims to be of 75,497,472 bytes"):
        surgery.exported_plan(file)
