"""Latency profiles: how long layers and chains take on one device, as a file that can come from another one.

A profile holds whole chains, not single layers whose times would be summed: between its layers a chain's data stay in the caches. Measured on
ResNet-18 in onnxruntime (one thread), the layers of a chain one by one took 1.07 to 1.22 times as long as the chain, and the network's time was
foretold to 0.00 and 0.02 of it by chains where single layers missed by 0.07 and 0.03.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from passes.errors import SurgeryError, SurgeryTypeError, SurgeryValueError
from passes.geometry import Geometry
from surgery.files import as_path, write_atomically
from surgery.plan import no_duplicates

__all__ = ["Entry", "Profile", "TimedShape", "cache_file", "read_shapes", "together", "write_shapes"]

FORMAT = "surgery.latency"
SHAPES_FORMAT = "surgery.shapes"
VERSION = 1
DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True, slots=True)
class TimedShape:
    """What is timed: layers one after the other, of these geometries, on an input of this shape.

    Attributes:
        layers: one for a layer as it is, several for a chain.
        input_shape: of the first, batch included.
        dtype: of weights and inputs, as torch names it.
        channels_last: whether torch stores them so.
    """

    layers: tuple[Geometry, ...]
    input_shape: tuple[int, ...]
    dtype: str = "float32"
    channels_last: bool = False

    @property
    def key(self) -> str:
        """A text that is the same for the same shape; for people to read too."""
        head = f"{self.dtype}{' channels_last' if self.channels_last else ''} {'x'.join(map(str, self.input_shape))}"
        return f"{head} | " + "; ".join(map(_layer_key, self.layers))

    @property
    def macs(self) -> int:
        total, size = 0, self.input_shape
        for layer in self.layers:
            total += layer.macs(size)
            size = layer.output_shape(size)
        return total

    @property
    def weights(self) -> int:
        """How many numbers the weights of all layers hold."""
        return sum(layer.weights for layer in self.layers)

    def to_data(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_data(cls, data: Any) -> TimedShape:
        """The inverse of ``to_data``.

        Raises:
            SurgeryValueError: it is none.
        """
        try:
            layers = tuple(_geometry(item) for item in data["layers"])
            shape = cls(layers, _ints(data["input_shape"]), str(data["dtype"]), bool(data["channels_last"]))
            size = shape.input_shape
            for layer in layers:
                if not layer.fits(size):
                    raise ValueError(f"{layer} cannot have an input of shape {size}")
                size = layer.output_shape(size)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise SurgeryValueError(f"not a shape to be timed ({type(error).__name__}: {error})") from error
        if shape.dtype not in DTYPES or not layers or min(shape.input_shape, default=1) < 1:
            raise SurgeryValueError(f"not a shape to be timed: dtype {shape.dtype!r}, input {shape.input_shape}, {len(layers)} layers")
        return shape


@dataclass(frozen=True, slots=True)
class Entry:
    """A median time, and how sure it is: ``spread`` is its standard error as a share of it."""

    seconds: float
    spread: float = 0.0

    def __post_init__(self) -> None:
        for value in (self.seconds, self.spread):
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
                raise SurgeryValueError(f"a time must be a number of seconds, got {value!r}")

    @property
    def low(self) -> float:
        return self.seconds * (1 - 2 * self.spread)

    @property
    def high(self) -> float:
        return self.seconds * (1 + 2 * self.spread)


def together(entries: Iterable[Entry]) -> Entry:
    """Of several calls, one after another."""
    all_of_them = list(entries)
    total = sum(entry.seconds for entry in all_of_them)
    return Entry(total, sum(entry.spread * entry.seconds for entry in all_of_them) / total if total else 0.0)


@dataclass(slots=True)
class Profile:
    """Times on one device.

    Attributes:
        device: what the times depend on beside the shape: processor, runtime and its version, threads, and whatever else tells devices apart.
        reference: seconds that a fixed layer took beside them; times taken under other loads compare by it. None where nobody measured it.
        entries: by ``TimedShape.key``.
    """

    device: dict[str, str]
    reference: float | None = None
    entries: dict[str, Entry] = field(default_factory=dict)

    def add(self, found: Mapping[str, Entry], reference: float) -> None:
        """Put times beside those already there, as they would have been when those were taken."""
        if self.reference is None:
            self.reference = reference
        scale = self.reference / reference
        self.entries |= {key: replace(entry, seconds=entry.seconds * scale) for key, entry in found.items()}

    def to_json(self) -> str:
        """Deterministic text with format and version."""
        entries = {key: [entry.seconds, entry.spread] for key, entry in sorted(self.entries.items())}
        data = {"format": FORMAT, "version": VERSION, "device": self.device, "reference": self.reference, "entries": entries}
        return json.dumps(data, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Profile:
        """The profile that ``to_json`` wrote, or that another device's tool did: an entry is [seconds, standard error as a share of them].

        Raises:
            SurgeryValueError: not such a text; the message names what is wrong.
        """
        data = _opened(text, FORMAT)
        device, entries, reference = data.get("device"), data.get("entries"), data.get("reference")
        if not isinstance(device, dict) or not all(isinstance(value, str) for value in device.values()):
            raise SurgeryValueError('profile: "device" must be an object of texts')
        if not isinstance(entries, dict):
            raise SurgeryValueError('profile: "entries" must be an object')
        if reference is not None and not (isinstance(reference, int | float) and 0 < reference < float("inf")):
            raise SurgeryValueError(f'profile: "reference" must be seconds or null, got {reference!r}')
        found = {}
        for key, value in entries.items():
            try:
                found[key] = Entry(*(value if isinstance(value, list) else [value]))
            except (SurgeryError, TypeError) as error:
                raise SurgeryValueError(f"profile: entry {key!r}: {error}") from error
        return cls(device, reference, found)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``to_json`` to a file, whole or not at all."""
        write_atomically(as_path("path", path), self.to_json().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read a profile's file. ``OSError`` passes through."""
        try:
            return cls.from_json(as_path("path", path).read_bytes())
        except SurgeryValueError as error:
            raise SurgeryValueError(f"{path}: {error}") from error


def cache_file(device: Mapping[str, str]) -> Path:
    """Where this device's profile is kept: in ``$SURGERY_CACHE``, else ``$XDG_CACHE_HOME/surgery``, else ``~/.cache/surgery``."""
    import hashlib

    folder = os.environ.get("SURGERY_CACHE")
    root = Path(folder) if folder else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "surgery"
    digest = hashlib.sha256(json.dumps(dict(device), sort_keys=True).encode()).hexdigest()[:16]
    return root / "latency" / f"{device.get('runtime', 'unknown').partition(' ')[0]}-{digest}.json"


def write_shapes(shapes: Sequence[TimedShape], path: Path) -> None:
    """A list of shapes for another device to time."""
    data = {"format": SHAPES_FORMAT, "version": VERSION, "shapes": {shape.key: shape.to_data() for shape in shapes}}
    write_atomically(path, (json.dumps(data, indent=1) + "\n").encode())


def read_shapes(path: Path) -> list[TimedShape]:
    """The list that ``write_shapes`` wrote.

    Raises:
        SurgeryValueError: not such a file; the message names the shape that is wrong.
    """
    try:
        data = _opened(path.read_bytes(), SHAPES_FORMAT).get("shapes")
        if not isinstance(data, dict):
            raise SurgeryValueError('profile: "shapes" must be an object')
        return [TimedShape.from_data(item) for item in data.values()]
    except SurgeryValueError as error:
        raise SurgeryValueError(f"{path}: {error}") from error


def _opened(text: str | bytes, kind: str) -> dict[str, Any]:
    try:
        data = json.loads(text, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise SurgeryValueError(f"profile: not JSON ({error})") from error
    if not isinstance(data, dict) or data.get("format") != kind:
        raise SurgeryValueError(f'profile: expected an object with "format": "{kind}"')
    if type(data.get("version")) is not int or data["version"] != VERSION:
        raise SurgeryValueError(f"profile: version {data.get('version')!r} is not one that this release reads ({VERSION})")
    return data


def _layer_key(g: Geometry) -> str:
    if g.is_linear:
        return f"linear {g.in_channels}>{g.out_channels}"

    def text(values: tuple[int, ...]) -> str:
        return "x".join(map(str, values))

    parts = [f"{'up' if g.transposed else 'conv'} {g.in_channels}>{g.out_channels} {text(g.kernel)}"]
    parts += [f"/{text(g.stride)}"] if any(s != 1 for s in g.stride) else []
    padding = g.padding if isinstance(g.padding, str) else text(g.padding)
    parts += [f"pad {padding}"] if isinstance(g.padding, str) or any(g.padding) else []
    parts += [f"by {text(g.dilation)}"] if any(d != 1 for d in g.dilation) else []
    parts += [f"groups {g.groups}"] if g.groups > 1 else []
    parts += [g.padding_mode] if g.padding_mode != "zeros" else []
    parts += [f"more {text(g.output_padding)}"] if any(g.output_padding) else []
    return " ".join(parts)


def _geometry(data: Any) -> Geometry:
    padding = data["padding"]
    into, out, groups = _ints([data["in_channels"], data["out_channels"], data["groups"]])
    if min(into, out, groups) < 1 or into % groups or out % groups:
        raise ValueError(f"{into} to {out} channels in {groups} groups")
    return Geometry(
        in_channels=into,
        out_channels=out,
        kernel=_ints(data["kernel"]),
        stride=_ints(data["stride"]),
        padding=padding if isinstance(padding, str) else _ints(padding),
        dilation=_ints(data["dilation"]),
        groups=groups,
        padding_mode=str(data["padding_mode"]),
        transposed=bool(data["transposed"]),
        output_padding=_ints(data["output_padding"]),
    )


def _ints(values: Any) -> tuple[int, ...]:
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        raise SurgeryTypeError(f"expected whole numbers, got {values!r}")
    return tuple(values)
