"""Every writer, stopped in the middle by a disk that takes no more: the old file is whole and nothing else is there."""

from __future__ import annotations

import contextlib
import copy
import errno
import os
import stat
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import surgery
from surgery.alternatives import Tradeoff, TradeoffRow
from surgery.cost.profile import Entry, Profile, TimedShape, write_shapes
from surgery.files import replacing, temporary_beside, write_atomically
from surgery.latency.times import profile_of
from surgery.zoo import load_weights
from tests.conftest import LONG
from tests.networks import Small

resource = pytest.importorskip("resource", reason="limits of file sizes are of POSIX systems")

IMAGES = torch.randn(1, 3, 12, 12)
CURVE = Tradeoff("macs", (TradeoffRow(share=0.5, used=0.5, error=0.1, cut=1), TradeoffRow(share=0.25, used=0.2, error=0.2, cut=2)))
SHAPE = TimedShape.from_data(
    {
        "layers": [
            {"in_channels": 8, "out_channels": 8, "kernel": [3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}
            | {"padding_mode": "zeros", "transposed": False, "output_padding": [0, 0]}
        ],
        "input_shape": [1, 8, 8, 8],
        "dtype": "float32",
        "channels_last": False,
    }
)
WRITERS = {
    "plan.json": lambda path: surgery.plan(Small(), 0.5).save(path),
    "net": lambda path: surgery.save(Small(), path),
    "profile.json": lambda path: Profile({"runtime": "eager"}, 1.0, {SHAPE.key: Entry(0.5)}).save(path),
    "shapes.json": lambda path: write_shapes([SHAPE], path),
    "curve.png": lambda path: CURVE.save_picture(path),
    "net.pt": lambda path: surgery.export_torchscript(Small().eval(), path, IMAGES),
    "net.pt2": lambda path: surgery.export_program(Small().eval(), path, IMAGES),
    "net.onnx": lambda path: surgery.export_onnx(Small().eval(), path, IMAGES, exporter="torchscript"),
    "net.xml": lambda path: surgery.export_openvino(Small().eval(), path, IMAGES, exporter="torchscript"),
}
SLOW = {"net.pt2", "net.onnx", "net.xml"}  # the same way of writing as net.pt; tried where SURGERY_LONG is set


@contextlib.contextmanager
def full_after(size: int):
    """No file can grow beyond so many bytes: the system refuses to write, to whatever library in whatever language."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_file_whole_and_no_litter(name, tmp_path):
    if name in SLOW and not LONG:
        pytest.skip("SURGERY_LONG is not set")
    path, write = tmp_path / name, WRITERS[name]
    write(path)
    before = contents(tmp_path)
    with full_after(50), pytest.raises((OSError, surgery.SurgeryError), match=name):
        write(path)
    assert contents(tmp_path) == before
    path.rename(tmp_path / "elsewhere") if path.is_dir() else path.unlink()
    before = contents(tmp_path)
    with full_after(50), pytest.raises((OSError, surgery.SurgeryError), match=name):
        write(path)
    assert contents(tmp_path) == before
    assert not path.exists()


@pytest.mark.parametrize("name", ["plan.json", "net", "profile.json", "shapes.json", "curve.png", "net.pt"])
def test_a_failing_rename_leaves_the_old_file_whole_and_no_litter(name, tmp_path, monkeypatch):
    path, write = tmp_path / name, WRITERS[name]
    write(path)
    before = contents(tmp_path)

    def fails(source, target, *_):
        if str(target) == str(path):
            raise OSError(5, "Input/output error", str(target))
        return really[0](source, target)

    really = (os.rename,)
    monkeypatch.setattr(os, "replace", fails)
    monkeypatch.setattr(os, "rename", lambda source, target: fails(source, target) if "old" not in str(source) else really[0](source, target))
    with pytest.raises(OSError, match="Input/output error"):
        write(path)
    assert contents(tmp_path) == before


def test_links_and_permissions_stay(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("old")
    file.chmod(0o640)
    link.symlink_to("file")
    write_atomically(link, b"new")
    assert link.is_symlink()
    assert file.read_text() == "new"
    assert file.stat().st_mode & 0o777 == 0o640
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link"]


def test_a_pipe_is_written_to(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_atomically(pipe, b"through")
    reader.join()
    assert read == [b"through"]
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.skipif(not Path("/dev/fd").is_dir(), reason="this system has no /dev/fd")
def test_a_pipe_without_a_name_is_written_to():
    ours, theirs = os.pipe()
    write_atomically(Path(f"/dev/fd/{theirs}"), b"through")
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        assert pipe.read() == b"through"


def test_errors_name_what_was_asked_for(tmp_path):
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        write_atomically(tmp_path, b"")
    with pytest.raises(FileNotFoundError, match=r"make it first: '.*nowhere'"), temporary_beside(tmp_path / "nowhere" / "file"):
        pass
    (tmp_path / "file").write_text("old")
    with pytest.raises(NotADirectoryError, match=r"'.*file/below'"):
        write_atomically(tmp_path / "file" / "below", b"")


def test_an_error_in_the_block_leaves_the_old_file(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "file") as work:  # noqa: PT012
        work.write_text("half")
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"file": b"old"}


def test_exports_go_where_a_link_points_and_keep_permissions(tmp_path):
    real, link = tmp_path / "real.pt", tmp_path / "link.pt"
    real.write_bytes(b"old")
    real.chmod(0o640)
    link.symlink_to(real)
    surgery.export_torchscript(nn.Conv2d(3, 4, 3), link, torch.zeros(1, 3, 8, 8))
    assert link.is_symlink()
    assert real.stat().st_size > 1000
    assert stat.S_IMODE(real.stat().st_mode) == 0o640


@pytest.mark.parametrize("verb", ["decompose_onnx", "reconstruct_onnx"])
def test_onnx_files_are_not_written_over_devices_and_pipes(verb, tmp_path):
    surgery.export_onnx(nn.Conv2d(3, 4, 3), tmp_path / "net.onnx", torch.zeros(1, 3, 8, 8), exporter="torchscript")
    pipe = tmp_path / "pipe.onnx"
    os.mkfifo(pipe)
    with pytest.raises(surgery.SurgeryValueError, match=r"out: .*pipe\.onnx is a device or a pipe"):
        getattr(surgery, verb)(tmp_path / "net.onnx", pipe)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    with pytest.raises(surgery.SurgeryTypeError, match="out: expected the path of a file"):
        getattr(surgery, verb)(tmp_path / "net.onnx", None)


def test_a_profile_that_the_user_named_and_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Profile, "save", full)
    monkeypatch.setattr("surgery.latency.times.time_shapes", lambda shapes, _: ({shape.key: Entry(0.5) for shape in shapes}, 1.0))
    with pytest.raises(OSError, match="No space left"):
        profile_of([SHAPE], tmp_path / "times.json", "eager", 1)
    assert not (tmp_path / "times.json").exists()


def test_weights_that_do_not_fit_fill_nothing(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    torch.save({"0.weight": torch.zeros(4, 3, 3, 3), "1.weight": torch.zeros(2, 2)}, tmp_path / "weights.pt")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(surgery.SurgeryValueError, match="does not fit Sequential"):
        load_weights(model, tmp_path / "weights.pt")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
