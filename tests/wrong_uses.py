"""Names that the code in docs/errors.md may use; ``hide("package")`` there means that a package is not installed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import surgery
from surgery.zoo import load_weights, make
from tests.networks import Small


def network(**layers: nn.Module) -> nn.Module:
    """``Small`` with other layers in some places."""
    found = Small().eval()
    for name, layer in layers.items():
        setattr(found, name, layer)
    return found


def spoilt(name: str, value: float) -> nn.Module:
    """``Small`` with one number of a layer's weight replaced."""
    found = Small().eval()
    with torch.no_grad():
        found.get_submodule(name).weight.view(-1)[7] = value
    return found


def holding_itself() -> nn.Module:
    found = nn.Sequential(nn.Conv2d(3, 8, 3))
    return found.append(found)


def quantized() -> nn.Module:
    from torch.ao.nn.quantized import Conv2d

    return nn.Sequential(Conv2d(3, 8, 3))


def broken_loader() -> Iterator[torch.Tensor]:
    yield torch.zeros(1, 3, 12, 12)
    raise RuntimeError("the network share is gone")


def used_up() -> Iterator[torch.Tensor]:
    return iter(())


def rewrite(file: str, change: Any) -> None:
    """The tensors of a safetensors file after a change to the dict of them."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(file, "pt") as opened:
        tensors, metadata = {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()  # noqa: SIM118
    change(tensors)
    save_file(tensors, file, metadata)


def edit(file: str, old: str, new: str) -> None:
    path = Path(file)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def cut(file: str, share: float = 0.5) -> None:
    content = Path(file).read_bytes()
    Path(file).write_bytes(content[: int(len(content) * share)])


def scope() -> Mapping[str, Any]:
    """The names that the code may use, made anew for each use."""
    model = Small().eval()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 12, 12)).sum().backward()
    sgd.step()  # so that it has a state that an error could spoil
    sgd.zero_grad()
    names = {"torch": torch, "nn": nn, "surgery": surgery, "copy": copy, "Path": Path, "make": make, "load_weights": load_weights, "Small": Small}
    names |= {"model": model, "images": torch.randn(2, 3, 12, 12), "other": Small(), "sgd": sgd}
    for helper in (network, spoilt, holding_itself, quantized, broken_loader, used_up, rewrite, edit, cut):
        names[helper.__name__] = helper
    return names
