"""Which networks ``coverage.py`` runs: registries by rules that name no model, and the small configurations of ``coverage_catalogue.py``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from coverage_check import Network
from torch import nn
from torchvision_kernels import provide_kernels

__all__ = ["LIBRARIES", "network_named", "networks"]

# Constructor options of torchvision, the first that a network takes: no weights to fetch, and a small size for those that scale their images.
OPTIONS: tuple[dict[str, Any], ...] = ({"weights_backbone": None, "min_size": 160, "max_size": 320}, {"weights_backbone": None}, {})


def networks(library: str) -> list[Network]:
    """The networks of a library, or nothing where it is not installed."""
    if importlib.util.find_spec(library) is None:
        return []
    return sorted(LIBRARIES[library](), key=lambda network: network.size)


def network_named(name: str) -> Network:
    """One network by the name that ``networks`` gave it."""
    library, _, rest = name.partition(":")
    makers = {"torchvision": _torchvision_model, "timm": _timm_model}
    if library in makers:
        return Network(name=name, library=library, make=partial(makers[library], rest))
    return next(network for network in LIBRARIES[library]() if network.name == name)


def _torchvision() -> Iterator[Network]:
    """All models but the quantized."""
    provide_kernels()
    from torchvision import models

    for name in sorted(set(models.list_models()) - set(models.list_models(module=models.quantization))):
        make = partial(_torchvision_model, name)
        yield Network(name=f"torchvision:{name}", library="torchvision", make=make, size=_size(make))


def _torchvision_model(name: str) -> nn.Module:
    provide_kernels()
    from torchvision import models

    for options in OPTIONS:
        try:
            return models.get_model(name, weights=None, **options)
        except TypeError:
            if not options:
                raise
    raise AssertionError("the last options are none")


def _timm() -> Iterator[Network]:
    """For each module of models the one with the fewest parameters."""
    provide_kernels()
    import timm

    for module in timm.list_modules():
        sizes = {name: _size(partial(_timm_model, name)) for name in timm.list_models(module=module)}
        if sizes:
            name = min(sizes, key=lambda n: (sizes[n], n))
            yield Network(name=f"timm:{name}", library="timm", make=partial(_timm_model, name), size=sizes[name])


def _timm_model(name: str) -> nn.Module:
    provide_kernels()
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False)
    return model


def _size(make: Callable[[], nn.Module]) -> int:
    """Parameters, counted without making any; where that fails more than any network has, so that others come first."""
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in make().parameters())
    except Exception:  # networks that cannot be made on the meta device fail in their own ways
        return 10**12


def _catalogue(library: str) -> Iterator[Network]:
    provide_kernels()
    from coverage_catalogue import CATALOGUE

    for name, make, given in CATALOGUE[library]:
        yield Network(name=f"{library}:{name}", library=library, make=make, given=given)


LIBRARIES: dict[str, Callable[[], Iterator[Network]]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "transformers": partial(_catalogue, "transformers"),
    "diffusers": partial(_catalogue, "diffusers"),
    "ultralytics": partial(_catalogue, "ultralytics"),
    "segmentation_models_pytorch": partial(_catalogue, "segmentation_models_pytorch"),
    "monai": partial(_catalogue, "monai"),
}
