"""Networks by name: ``torchvision:NAME``, ``timm:NAME``, ``surgery:NAME`` (bundled), ``package.module:factory``, or a folder that ``save`` wrote."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from passes.errors import MissingExtra, SurgeryTypeError, SurgeryValueError, nearest
from passes.running import first_line, private_copy, shorten
from surgery.checkpoint import PLAN_FILE, load, read_architecture
from surgery.files import as_path
from surgery.naming import callable_named
from surgery.record import SurgeryRecord, write_record
from surgery.zoo.densenet_cifar import densenet40
from surgery.zoo.resnet_cifar import resnet20, resnet56
from surgery.zoo.torchvision_ops import import_torchvision
from surgery.zoo.vgg_cifar import vgg19, vgg19_quarter

__all__ = ["BUNDLED", "is_registered", "load_network", "load_weights", "make"]

WEIGHTS = Path(__file__).parent / "weights"
BUNDLED: dict[str, tuple[Callable[[], nn.Module], str | None, tuple[int, ...]]] = {
    "resnet20": (resnet20, "resnet20_cifar10.safetensors", (1, 3, 32, 32)),
    "resnet56": (resnet56, None, (1, 3, 32, 32)),
    "vgg19": (vgg19, None, (1, 3, 32, 32)),
    "vgg19_quarter": (vgg19_quarter, None, (1, 3, 32, 32)),
    "densenet40": (densenet40, None, (1, 3, 32, 32)),
}
PICTURE = (1, 3, 224, 224)
REGISTRIES = ("torchvision", "timm", "surgery")


def is_registered(name: str | None) -> bool:
    """Whether a name is one of a registry. What a file says is made only then: any other name would import what it likes."""
    return name is not None and name.partition(":")[0] in REGISTRIES


def make(name: str, architecture: str | None = None) -> tuple[nn.Module, tuple[int, ...]]:
    """A network by name in eval mode, and the shape of the input it is usually given.

    ``surgery:resnet20`` comes with trained weights; all other networks are made with random ones, see ``load_weights``.

    Args:
        name: ``torchvision:NAME``, ``timm:NAME``, ``surgery:NAME``, ``package.module:factory``, or a folder that ``surgery.save`` wrote.
        architecture: for a folder, what it is a checkpoint of, written like ``name``; needed where it does not say so itself.

    Raises:
        SurgeryValueError: no such registry, network or module.
        SurgeryTypeError: the factory gives something else than a module.
        MissingExtra: the package of a registry is not installed.
    """
    if not isinstance(name, str | os.PathLike):
        raise SurgeryTypeError(f"MODEL: expected a name, got {type(name).__name__}")
    text = str(name)
    if text and (Path(text) / PLAN_FILE).is_file():
        return load_network(text, architecture)
    if architecture is not None:
        raise SurgeryValueError(f"architecture: is for a folder that surgery.save wrote, and {text!r} is none")
    registry, _, rest = text.partition(":")
    if not rest:
        raise SurgeryValueError(
            f"MODEL {text!r}: expected torchvision:NAME, timm:NAME, surgery:NAME, package.module:factory, or a folder written by surgery.save"
        )
    makers = {"torchvision": _torchvision, "timm": _timm, "surgery": _bundled}
    if registry not in makers:
        return _from_factory(registry, rest), PICTURE
    model, shape = makers[registry](rest)
    write_record(model, SurgeryRecord(architecture=text))
    return model.eval(), shape


def load_network(path: str, architecture: str | None = None) -> tuple[nn.Module, tuple[int, ...]]:
    """A network from a folder that ``save`` wrote, made as ``architecture`` says, or else as the folder says where that is a registry name.

    Raises:
        SurgeryValueError: neither says it. A factory named in the folder is never imported.
    """
    if architecture is None:
        recorded = read_architecture(path)
        architecture = recorded if is_registered(recorded) else None
    if architecture is None:
        raise SurgeryValueError(
            f"{path}: does not say which registered network it is; name it (--architecture package.module:factory on the command line), "
            f"or use surgery.load({path!r}, fresh_model) from Python"
        )
    fresh, shape = make(architecture)
    model = load(path, fresh)
    return model.eval(), shape


def load_weights(model: nn.Module, file: str | os.PathLike[str]) -> None:
    """Fill a network from a state dict in a ``.safetensors`` file, or one that ``torch.save`` wrote (read without executing anything in it).

    A state dict inside ``{"state_dict": ...}`` or ``{"model": ...}`` is found, and a ``module.`` that parallel training put before all keys removed.

    Raises:
        SurgeryValueError: not such a file, or keys and shapes that do not fit.
        OSError: it cannot be read.
    """
    state: Any = _read_state(as_path("file", file))
    for key in ("state_dict", "model"):
        if isinstance(state.get(key), dict):
            state = state[key]
    if state and all(isinstance(k, str) and k.startswith("module.") for k in state):
        state = {k.removeprefix("module."): v for k, v in state.items()}
    blank = private_copy(model).to("meta")
    try:
        blank.load_state_dict(state, strict=True, assign=True)  # so that a model which it does not fit stays as it was
        model.load_state_dict(state, strict=True)
    except (RuntimeError, AttributeError, TypeError) as error:
        told = " ".join(str(error).partition(":\n")[2].split()) or first_line(error)
        raise SurgeryValueError(f"{file}: does not fit {type(model).__name__}: {shorten(told)}") from error


def _read_state(file: Path) -> dict[str, object]:
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(file))
        except SafetensorError as error:
            raise SurgeryValueError(f"{file}: damaged or not a safetensors file ({error})") from error
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except UnpicklingError as error:
        raise SurgeryValueError(
            f"{file}: it is no state dict: damaged, or it holds pickled code, which is never run here; write model.state_dict() by torch.save"
        ) from error
    except Exception as error:  # torch.load has no family of errors of its own
        raise SurgeryValueError(
            f"{file}: torch.load cannot read it as plain weights ({type(error).__name__}: {next(iter(str(error).splitlines()), '')})"
        ) from error
    if not isinstance(state, dict):
        raise SurgeryValueError(f"{file}: holds a {type(state).__name__}, not a state dict")
    return state


def _bundled(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    if name not in BUNDLED:
        raise SurgeryValueError(f"surgery:{name}: no such bundled network; {nearest(name, BUNDLED)}")
    factory, weights, shape = BUNDLED[name]
    model = factory()
    if weights is not None:
        load_weights(model, WEIGHTS / weights)
    return model, shape


def _torchvision(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    import_torchvision()
    from torchvision import models

    known = models.list_models()
    if name not in known:
        raise SurgeryValueError(f"torchvision:{name}: torchvision has no such network; {nearest(name, known)}")
    extra = {"weights_backbone": None} if name in models.list_models(module=models.detection) + models.list_models(module=models.segmentation) else {}
    shape: tuple[int, ...] = PICTURE
    if name in models.list_models(module=models.video):
        size = 224 if name.startswith(("mvit", "s3d", "swin3d")) else 112  # as each is trained; the first two take nothing smaller
        shape = (1, 3, 16, size, size)
    return models.get_model(name, weights=None, **extra), shape


def _timm(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    if importlib.util.find_spec("timm") is None:
        raise MissingExtra.of("timm is not installed", "zoo")
    import_torchvision()  # timm imports it
    import timm

    if not timm.is_model(name):
        raise SurgeryValueError(f"timm:{name}: timm has no such network; {nearest(name, timm.list_models())}")
    model = timm.create_model(name, pretrained=False)
    size = getattr(model, "pretrained_cfg", {}).get("input_size", PICTURE[1:])
    return model, (1, *size)


def _from_factory(module_name: str, factory_name: str) -> nn.Module:
    factory = callable_named(module_name, factory_name, "MODEL", "registry of that name (torchvision, timm, surgery)")
    try:
        model = factory()
    except (Exception, SystemExit) as error:  # the user's own code runs here: it may raise anything
        raise SurgeryValueError(f"{module_name}:{factory_name}: the factory failed without arguments: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise SurgeryTypeError(f"{module_name}:{factory_name}: the factory must give an nn.Module, got {type(model).__name__}")
    return model.eval()
