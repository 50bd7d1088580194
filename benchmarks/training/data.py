"""Pictures to train on: CIFAR-10 whole on the device, augmented there by tensor operations; or an ImageNet folder, read as it goes."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import cifar10
import torch
from torch import Tensor

from surgery import SurgeryValueError
from surgery.zoo.torchvision_ops import import_torchvision

__all__ = ["Folder", "InMemory", "Pictures"]

Batches = Iterator[tuple[Tensor, Tensor]]
ASIDE = 10**6  # the number of an epoch that no run reaches: its batches are for looking at
TEST_BATCH = 500


class Pictures(Protocol):
    """Batches of pictures (N, 3, H, W), normalised, and labels (N,), on the device that is trained on."""

    def train(self, seed: int, epoch: int) -> Batches:
        """All training pictures once, in an order and with crops that depend on seed and epoch alone."""

    def test(self) -> Batches:
        """All test pictures, as they are."""

    def sample(self, count: int) -> list[Tensor]:
        """So many training batches without labels, the same at each call."""

    def facts(self) -> dict[str, Any]:
        """What a run depends on beside its recipe, as plain data; not where the pictures lie."""


@dataclass(frozen=True, slots=True, eq=False)
class InMemory:
    """Pictures that fit on the device, padded there once; a batch is cropped and flipped in one look-up.

    Attributes:
        padded: uint8 (N, H + 2 * PAD, W + 2 * PAD, 3), black at the borders.
        labels: (N,).
        test_pixels: uint8 (M, H, W, 3).
        test_labels: (M,).
        batch: pictures a step; what is left over in the end of an epoch is left out, where that is not all.
    """

    padded: Tensor
    labels: Tensor
    test_pixels: Tensor
    test_labels: Tensor
    batch: int

    PAD = 4

    @classmethod
    def cifar10(cls, root: Path, batch: int, device: str, subset: int | None = None) -> InMemory:
        """From ``root/cifar-10-batches-py``, with the first ``subset`` training pictures.

        Raises:
            SurgeryValueError: the folder is not there, or has fewer pictures.
        """
        if not (root / cifar10.FOLDER).is_dir():
            raise SurgeryValueError(f"data: {root} holds no {cifar10.FOLDER}, the official files of CIFAR-10")
        pixels, labels = cifar10.read_pixels(root, cifar10.TRAIN_FILES)
        _check_subset(subset, batch, len(labels))
        test_pixels, test_labels = cifar10.read_pixels(root, cifar10.TEST_FILES)
        p = cls.PAD
        padded = torch.nn.functional.pad(pixels[:subset].permute(0, 2, 3, 1), (0, 0, p, p, p, p))
        return cls(*(t.to(device) for t in (padded, labels[:subset], test_pixels.permute(0, 2, 3, 1).contiguous(), test_labels)), batch)

    def train(self, seed: int, epoch: int) -> Batches:
        generator = torch.Generator().manual_seed(100_003 * seed + epoch)  # on the CPU: the same pictures on every device
        count = len(self.labels)
        order = torch.randperm(count, generator=generator)
        top, left, flip = (torch.randint(0, most, (count,), generator=generator) for most in (2 * self.PAD + 1, 2 * self.PAD + 1, 2))
        order, top, left, flip = (t.to(self.labels.device) for t in (order, top, left, flip))
        used = count // self.batch * self.batch or count
        for start in range(0, used, self.batch):
            part = slice(start, min(start + self.batch, used))
            yield self._cropped(order[part], top[part], left[part], flip[part].bool()), self.labels[order[part]]

    def test(self) -> Batches:
        for pixels, labels in zip(self.test_pixels.split(TEST_BATCH), self.test_labels.split(TEST_BATCH), strict=True):
            yield _normalised(pixels), labels

    def sample(self, count: int) -> list[Tensor]:
        return [x for x, _ in itertools.islice(self.train(0, ASIDE), count)]

    def facts(self) -> dict[str, Any]:
        return {"size": self.test_pixels.shape[1], "train_pictures": len(self.labels), "test_pictures": len(self.test_labels)}

    def _cropped(self, index: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
        height, width = (size - 2 * self.PAD for size in self.padded.shape[1:3])
        rows, across = (torch.arange(size, device=index.device) for size in (height, width))
        columns = left[:, None] + torch.where(flip[:, None], width - 1 - across, across)
        return _normalised(self.padded[index[:, None, None], (top[:, None] + rows)[:, :, None], columns[:, None, :]])


def _check_subset(subset: int | None, batch: int, pictures: int) -> None:
    if subset is not None and not batch <= subset <= pictures:
        raise SurgeryValueError(f"subset: expected one batch ({batch}) to all of the {pictures} pictures, got {subset}")


def _normalised(pixels: Tensor) -> Tensor:
    """uint8 (N, H, W, 3) to float32 (N, 3, H, W), channels last."""
    mean, std = (255 * torch.tensor(v, device=pixels.device) for v in (cifar10.MEAN, cifar10.STD))
    return ((pixels.float() - mean) / std).permute(0, 3, 1, 2)


@dataclass(slots=True, eq=False)
class Folder:
    """Pictures in ``root/train/CLASS/`` and ``root/val/CLASS/``, cropped as is usual for ImageNet: at random to train, in the middle to test.

    Both are listed when it is made: what is wrong with them is said before anything is trained. Labels are the numbers of train's classes.

    Attributes:
        root: of both folders.
        batch: pictures a step.
        device: where batches are given.
        size: of the crops; pictures are tested at 8/7 of it before the crop.
        workers: processes that read; which crops are drawn depends on their number.
        subset: so many training pictures, drawn once; all where None.

    Raises:
        SurgeryValueError: a part is not there or has no classes, a class has no pictures, ``val`` has one that ``train`` has not, or ``subset`` is
            less than a batch or more than there is.
    """

    root: Path
    batch: int
    device: str
    size: int = 224
    workers: int = 8
    subset: int | None = None
    _train: Any = field(init=False, repr=False)  # as torchvision lists them
    _val: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        missing = [name for name in ("train", "val") if not (self.root / name).is_dir()]
        if missing:
            raise SurgeryValueError(f"data: {self.root} holds no folder {missing[0]!r}; expected train/CLASS/ and val/CLASS/")
        import_torchvision()
        from torchvision.transforms import v2 as transforms

        self._val = self._listed("val", [transforms.Resize(self.size * 8 // 7), transforms.CenterCrop(self.size)])
        self._train = self._listed("train", [transforms.RandomResizedCrop(self.size), transforms.RandomHorizontalFlip()])
        _check_subset(self.subset, self.batch, len(self._train))
        numbers = self._train.class_to_idx
        unknown = [name for name in self._val.classes if name not in numbers]
        if unknown:
            told = f"the class {unknown[0]!r}" + (f" and {len(unknown) - 1} others" if unknown[1:] else "")
            raise SurgeryValueError(f"data: {self.root / 'val'} has {told}, which {self.root / 'train'} has not; give both the same folders")
        self._val.target_transform = [numbers[name] for name in self._val.classes].__getitem__  # it may lack some of train's classes

    def train(self, seed: int, epoch: int) -> Batches:
        pictures = self._train
        if self.subset is not None:
            chosen = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))[: self.subset]
            pictures = torch.utils.data.Subset(pictures, chosen.tolist())
        generator = torch.Generator().manual_seed(100_003 * seed + epoch)
        yield from self._batches(pictures, shuffle=True, drop_last=len(pictures) >= self.batch, generator=generator)

    def test(self) -> Batches:
        yield from self._batches(self._val)

    def sample(self, count: int) -> list[Tensor]:
        torch.manual_seed(ASIDE)  # crops are drawn in this process where there are no workers
        return [x for x, _ in itertools.islice(self.train(0, ASIDE), count)]

    def facts(self) -> dict[str, Any]:
        names = self._train.classes
        counts = {"train_pictures": len(self._train), "test_pictures": len(self._val)}
        return {"size": self.size, "classes": len(names), "class_names_crc32": f"{zlib.crc32('|'.join(names).encode()):08x}", **counts}

    def _listed(self, part: str, steps: list[Any]) -> Any:
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import v2 as transforms

        ready = [transforms.ToImage(), transforms.ToDtype(torch.float32, scale=True), transforms.Normalize(cifar10.MEAN, cifar10.STD)]
        try:
            return ImageFolder(str(self.root / part), transforms.Compose([*steps, *ready]))
        except FileNotFoundError as error:  # no folders of classes, or one without pictures
            told = f"{error}".splitlines()[0].rstrip(". ")
            raise SurgeryValueError(f"data: {told}; expected {self.root / part}/CLASS/ with the pictures of each class") from error

    def _batches(self, pictures: Any, **options: Any) -> Batches:
        pinned = self.device.startswith("cuda")
        for x, y in torch.utils.data.DataLoader(pictures, self.batch, num_workers=self.workers, pin_memory=pinned, **options):
            yield x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
