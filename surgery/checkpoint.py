"""``save`` and ``load``: a folder with ``plan.json`` and ``model.safetensors``. No pickle, and nothing named in a file is imported."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from passes import CLEANUP_PASSES, Host, host_for
from passes.chain import wraps_numbers
from passes.decompose import refusal_of
from passes.errors import SurgeryTypeError, SurgeryValueError, nearest
from passes.factorization import Factorization, Keep
from passes.geometry import Piece
from passes.host import tied_pieces
from passes.kinds import kind_of
from passes.outline import MOST, Outline
from passes.running import private_copy
from passes.site import Call, Site
from passes.watching import FunctionUse
from surgery.cost.outcome import LatencyOutcome
from surgery.files import as_path, naming, temporary_beside
from surgery.inspection import usable_model
from surgery.plan import Plan, no_duplicates
from surgery.record import SiteRecord, SurgeryRecord, passes_of, records_by_name, whole_record, write_record
from surgery.report import NOT_DECOMPOSED
from surgery.undoing import Undo, undone_on_error

__all__ = [
    "PLAN_FILE",
    "WEIGHTS_FILE",
    "check_replaceable",
    "load",
    "read_architecture",
    "record_from_text",
    "record_to_data",
    "save",
    "with_empty_chains",
]

PLAN_FILE = "plan.json"
WEIGHTS_FILE = "model.safetensors"
METADATA = "surgery"
LARGEST = 2**63 - 1  # of a count: what torch can hold


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model, decomposed or not, to a folder: ``plan.json`` (readable, a ``Plan``) and ``model.safetensors`` (weights and record).

    Args:
        model: any module whose state dict holds tensors only.
        path: the folder; it is written whole or not at all, and an earlier checkpoint there is replaced.

    Raises:
        SurgeryTypeError: a wrapped model, or one whose state dict holds something other than plain tensors.
        SurgeryValueError: ``path`` exists and is not a folder that ``save`` wrote, or something beside surgery has changed the architecture:
            clean-up passes, or the layers of a chain by pruning, parametrizations and the like.
        OSError: the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    usable_model(model)
    _check_architecture(model)
    given = as_path("path", path)
    check_replaceable(given)
    folder = given.resolve()
    records = records_by_name(model)
    plan = Plan()
    for site in host_for(model).sites():
        known = records.get(site.name)
        plan[site.name] = site.chain or Keep((known.reason if known else None) or NOT_DECOMPOSED)
    _check_chains(model, plan)
    tensors = _tensors_to_write(model)
    metadata = {METADATA: json.dumps(record_to_data(whole_record(model) or SurgeryRecord()))}
    with temporary_beside(folder) as work, naming(given):
        new = work / folder.name
        new.mkdir()
        plan.save(new / PLAN_FILE)
        try:
            save_file(tensors, new / WEIGHTS_FILE, metadata)
        except SafetensorError as error:  # of the file system: what is in the tensors was checked
            raise OSError(f"{given}: its weights cannot be written ({error})") from error
        with undone_on_error() as undo:
            if folder.exists():
                undo.later(lambda: None if folder.exists() else os.rename(work / "old", folder))
                os.rename(folder, work / "old")
            os.rename(new, folder)


def _check_chains(model: nn.Module, plan: Plan) -> None:
    """Refuse chains whose layers hold something else than their plan says, which ``load`` could not build."""
    keys = [key for key in model.state_dict() if not key.endswith("_extra_state")]
    for site in host_for(model).sites():
        chain = plan[site.name]
        if not isinstance(chain, Factorization):
            continue
        layers = [f"{site.name}.{shape.name}".lstrip(".") for shape in kind_of(chain).shapes(site.geometry, chain, False)]
        found = {key for key in keys for layer in layers if key.startswith(f"{layer}.")}
        other = sorted(found - {f"{layers[-1]}.bias"} ^ {f"{layer}.weight" for layer in layers})
        if other:
            raise SurgeryValueError(
                f"{site}: the layers of its chain were changed after the cut ({other[0]}), by pruning, a parametrization or the like, and could "
                "not be built anew; undo that before saving"
            )


def load(path: str | os.PathLike[str], fresh_model: nn.Module) -> nn.Module:
    """The model that ``save`` wrote, from a fresh instance of the original architecture, which is not touched.

    Chains are built empty from the plan, then filled. Numbers take the dtype and device of ``fresh_model``, as ``load_state_dict`` has it. Nothing
    that the folder names is imported, and nothing in it is executed.

    Args:
        path: the folder.
        fresh_model: an instance of the original architecture; its numbers do not matter.

    Raises:
        SurgeryValueError: the folder's files are damaged, or do not fit ``fresh_model``; the message names the layer or key.
        OSError: a file is missing or cannot be read.
    """
    usable_model(fresh_model)
    folder = as_path("path", path)
    plan = Plan.load(folder / PLAN_FILE)
    tensors, metadata = _read_weights(folder / WEIGHTS_FILE)
    record = record_from_text(metadata.get(METADATA, "{}"), folder / WEIGHTS_FILE)
    with torch.inference_mode(False):  # what is loaded must be fit for training
        model = with_empty_chains(private_copy(fresh_model), plan, folder / PLAN_FILE)
        _fill(model, tensors, folder / WEIGHTS_FILE)
    _check_calls(model, record, folder / WEIGHTS_FILE)
    write_record(model, record)
    return model


def read_architecture(path: str | os.PathLike[str]) -> str | None:
    """The registry name that a saved model was made from, or None where it was made otherwise."""
    file = Path(path) / WEIGHTS_FILE
    return record_from_text(_open(file, lambda f: f.metadata() or {}).get(METADATA, "{}"), file).architecture


def _check_architecture(model: nn.Module) -> None:
    """A network that clean-up passes have changed could not be filled into a fresh instance of its class."""
    names = {step.__name__ for step in CLEANUP_PASSES}
    ran = [name for name in passes_of(model) if name in names]
    if ran:
        raise SurgeryValueError(
            f"model: {' and '.join(dict.fromkeys(ran))} changed its architecture, and load could not rebuild it from a fresh instance; export it "
            "(surgery.export_onnx, surgery.export_torchscript), or save the network from before"
        )


def check_replaceable(folder: Path) -> None:
    """Refuse what ``save`` would have to delete and did not write.

    Raises:
        SurgeryValueError: a file, or a folder with anything else in it.
        OSError: nobody may look there.
    """
    if not folder.exists():
        return
    ours = {PLAN_FILE, WEIGHTS_FILE}
    if not folder.is_dir() or not {p.name for p in folder.iterdir()} <= ours:
        raise SurgeryValueError(f"{folder}: exists and is not a folder written by surgery.save; give another path")


def _distinct(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with every tensor once, under its first name."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise SurgeryTypeError(f"{name}: the state dict holds a {type(value).__name__} there; only tensors can be saved")
        if id(value) not in seen:
            seen.add(id(value))
            found[name] = value
    return found


def _tensors_to_write(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the state dict on the CPU, contiguous, in storage that it shares with no other."""
    found: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in _distinct(model).items():
        if value.is_meta:
            raise SurgeryValueError(f"{name}: it is on the meta device and has no numbers to save; load weights first")
        if wraps_numbers(value):
            raise SurgeryTypeError(f"{name}: a {type(value).__name__} (quantized or the like) has no plain numbers; save it before it is quantized")
        if (kind := _unwritable(value)) is not None:
            raise SurgeryTypeError(f"{name}: a {kind} tensor cannot be kept in a safetensors file; make it a plain one, or a non-persistent buffer")
        tensor = value.detach().cpu().resolve_conj().resolve_neg().contiguous()  # which are kept as marks, not in the numbers
        storage = tensor.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        found[name] = tensor
    return found


def _unwritable(tensor: Tensor) -> str | None:
    """What keeps a tensor out of a safetensors file, None where nothing does."""
    from safetensors.torch import save as written

    if tensor.layout is not torch.strided or tensor.is_nested:
        return "sparse or nested"
    if tensor.is_quantized:
        return "quantized"
    try:
        written({"tensor": torch.empty(0, dtype=tensor.dtype)})
    except KeyError:
        return str(tensor.dtype).removeprefix("torch.")
    return None


def with_empty_chains(model: nn.Module, plan: Plan, file: Path, undo: Undo | None = None) -> nn.Module:
    """The model with the chains of a plan, without numbers; what takes them out again is added to ``undo``."""
    host = host_for(model, effective_weights=True)  # whatever the plan cuts; the numbers come from the file
    sites = {site.name: site for site in host.sites()}
    placed: dict[str, tuple[Piece, ...]] = {}
    for name, decision in plan.items():
        if name not in sites:
            raise SurgeryValueError(f"{file}: it names {name!r}, which is no layer of this {type(model).__name__}: {nearest(name, sites)}")
        if isinstance(decision, Factorization):
            placed[name] = _replace_empty(host, sites[name], decision, file, placed)
    if undo is not None:
        undo.later(host.rollback)
    made: nn.Module = host.commit()
    return made


def _replace_empty(host: Host, site: Site, factorization: Factorization, file: Path, placed: Mapping[str, tuple[Piece, ...]]) -> tuple[Piece, ...]:
    reason = "it is already decomposed; give a fresh model" if site.chain else site.keep or refusal_of(site, factorization)
    if reason is not None:
        raise SurgeryValueError(f"{file}: {site.name!r} cannot be {factorization}: {reason}")
    if site.tied_to is not None and site.tied_to in placed:
        return host.replace(site, factorization, tied_pieces(site, factorization, placed[site.tied_to]))
    shapes = kind_of(factorization).shapes(site.geometry, factorization, site.bias is not None)
    return host.replace(site, factorization, [shape.empty(site.weight) for shape in shapes])


def _read_weights(file: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    found: tuple[dict[str, Tensor], Mapping[str, str]] = _open(file, lambda f: ({key: f.get_tensor(key) for key in f.keys()}, f.metadata() or {}))  # noqa: SIM118
    return found


def _open(file: Path, read: Any) -> Any:
    from safetensors import SafetensorError, safe_open

    with file.open("rb"):  # what the system has against it is said in its own words
        pass
    try:
        with safe_open(file, framework="pt") as opened:
            return read(opened)
    except SafetensorError as error:
        raise SurgeryValueError(f"{file}: damaged or not a safetensors file ({error})") from error


def _fill(model: nn.Module, tensors: dict[str, Tensor], file: Path) -> None:
    expected = _distinct(model)
    held = {id(t) for t in (*model.parameters(), *model.buffers())}
    missing, unexpected = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or unexpected:
        first = (missing or unexpected)[0]
        what = f"{len(missing)} keys are missing and {len(unexpected)} unexpected, the first is {first!r}"
        raise SurgeryValueError(f"{file}: does not fit this {type(model).__name__} with its plan: {what}")
    with torch.no_grad():
        for name, target in expected.items():
            if target.shape != tensors[name].shape:
                shapes = f"{tuple(tensors[name].shape)}, the model needs {tuple(target.shape)}"
                raise SurgeryValueError(f"{file}: {name!r} has shape {shapes}")
            if _sort(target.dtype) != _sort(tensors[name].dtype):
                raise SurgeryValueError(f"{file}: {name!r} is {tensors[name].dtype}, the model needs {target.dtype}")
            if target.is_meta:
                raise SurgeryValueError(
                    f"fresh_model: its {name!r} is on the meta device and cannot be filled; call fresh_model.to_empty(device=...) first"
                )
            if id(target) not in held:
                raise SurgeryValueError(f"{file}: {type(model).__name__}.state_dict() gives a copy of {name!r}, so it cannot be filled")
            target.copy_(tensors[name])


def _sort(dtype: torch.dtype) -> tuple[bool, bool]:
    """Between dtypes of one sort numbers can be copied and are what they were, but for rounding."""
    return dtype.is_floating_point, dtype.is_complex


def _check_calls(model: nn.Module, record: SurgeryRecord, file: Path) -> None:
    """Recorded calls must be such as the layers can have; costs are computed from them."""
    calls = {site.name: site.calls or () for site in record.sites}
    for site in host_for(model).sites():
        for call in calls.get(site.name, ()):
            if not site.geometry.fits(call.input_shape):
                raise SurgeryValueError(
                    f"{file}: its surgery record is damaged: {site.name!r} ({site.geometry}) cannot have been called with {call.input_shape}"
                )


def record_to_data(record: SurgeryRecord) -> dict[str, Any]:
    sites = [
        {
            "name": site.name,
            "reason": site.reason,
            "error": site.error,
            "output_error": site.output_error,
            "calls": None if site.calls is None else [[c.input_shape, c.output_shape] for c in site.calls],
            "params": site.params,
            "spectra": [asdict(outline) for outline in site.spectra],
        }
        for site in record.sites
    ]
    rest = {name: getattr(record, name) for name in ("passes", "macs", "input_shapes", "architecture", "calibrated")}
    functions = [
        {
            "module": function.module,
            "function": function.function,
            "weight": function.weight,
            "weight_shape": function.weight_shape,
            "calls": [[c.input_shape, c.output_shape] for c in function.calls],
            "macs": function.macs,
        }
        for function in record.functions
    ]
    latency = {} if record.latency is None else {"latency": asdict(record.latency)}
    return {"version": 1, "sites": sites, "functions": functions} | rest | latency


def record_from_text(text: str, file: Path) -> SurgeryRecord:
    """The record in a weights file. Its values are only ever shown, so wrong types are all that must be caught."""
    try:
        data = json.loads(text, object_pairs_hook=no_duplicates)
        if type(data.get("version", 1)) is not int or data.get("version", 1) != 1:
            raise ValueError(f"version {data['version']!r} is not one that this release reads (1)")
        return SurgeryRecord(
            sites=tuple(
                SiteRecord(
                    name=_of(str, item["name"]),
                    reason=None if item["reason"] is None else _of(str, item["reason"]),
                    error=None if item["error"] is None else float(item["error"]),
                    output_error=None if item.get("output_error") is None else float(item["output_error"]),
                    calls=None if item["calls"] is None else tuple(Call(_shape(a), _shape(b)) for a, b in item["calls"]),
                    params=None if item.get("params") is None else _of(int, item["params"]),
                    spectra=tuple(_outline(outline) for outline in item.get("spectra", [])),
                )
                for item in data.get("sites", [])
            ),
            passes=tuple(_of(str, name) for name in data.get("passes", [])),
            macs=None if data.get("macs") is None else _of(int, data["macs"]),
            input_shapes=None if data.get("input_shapes") is None else tuple(_shape(s) for s in data["input_shapes"]),
            calibrated=_of(int, data.get("calibrated", 0)),
            architecture=None if data.get("architecture") is None else _of(str, data["architecture"]),
            functions=tuple(
                FunctionUse(
                    module=_of(str, item["module"]),
                    function=_of(str, item["function"]),
                    weight=_of(str, item["weight"]),
                    weight_shape=_shape(item["weight_shape"]),
                    calls=tuple(Call(_shape(a), _shape(b)) for a, b in item["calls"]),
                    macs=_of(int, item["macs"]),
                )
                for item in data.get("functions", [])
            ),
            latency=None if data.get("latency") is None else _latency(data["latency"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SurgeryValueError(f"{file}: its surgery record is damaged ({type(error).__name__}: {error})") from error


def _latency(item: Any) -> LatencyOutcome:
    share = {name: None if item[name] is None else float(item[name]) for name in ("predicted", "measured", "low", "high")}
    return LatencyOutcome(
        runtime=_of(str, item["runtime"]),
        asked=float(item["asked"]),
        predicted=share["predicted"],
        measured=share["measured"],
        low=share["low"],
        high=share["high"],
        replans=_of(int, item["replans"]),
        batch=_of(int, item["batch"]),
        threads=_of(int, item["threads"]),
        kept=item["kept"] is True,
        note=None if item["note"] is None else _of(str, item["note"]),
    )


def _outline(item: Any) -> Outline:
    full, values = _of(int, item["full"]), tuple(float(value) for value in item["values"])
    if len(values) != min(full, MOST) or not all(0 <= value <= 1 for value in values):
        raise ValueError(f"{len(values)} values in the outline of {full} singular values, or some that are no shares")
    return Outline(mode=_of(str, item["mode"]), full=full, values=values, weighted=item["weighted"] is True)


def _of(kind: type, value: Any) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"expected {kind.__name__}, got {value!r}")
    if isinstance(value, int) and not 0 <= value <= LARGEST:
        raise ValueError(f"expected a count, got {value:.3g}")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(_of(int, n) for n in value)
