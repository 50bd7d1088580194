"""Train the bundled ResNet-20 on CIFAR-10 from scratch: the exact run behind the weights in ``surgery/zoo/weights``.

    python benchmarks/train_resnet20.py --data ROOT --out RUN_FOLDER

ROOT holds the official ``cifar-10-batches-py``. The run checkpoints after each epoch and resumes where it stopped; its log
(``RUN_FOLDER/log.jsonl``), the weights (``resnet20_cifar10.safetensors``) and nothing else are the result. The last epoch's
weights are kept, not the best epoch's: the test images choose nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import cifar10
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from surgery.zoo.resnet_cifar import resnet20


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 in percent."""
    model.eval()
    with torch.inference_mode():
        hits = sum(
            int((model(x.contiguous(memory_format=torch.channels_last)).argmax(1) == y).sum())
            for x, y in zip(images.split(500), labels.split(500), strict=True)
        )
    return 100 * hits / len(labels)


def train(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    model = resnet20().to(memory_format=torch.channels_last)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=0.9, nesterov=True)
    train_images, train_labels = cifar10.read(args.data, cifar10.TRAIN_FILES)
    test_images, test_labels = cifar10.read(args.data, cifar10.TEST_FILES)
    steps = len(train_images) // args.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.epochs * steps, pct_start=0.2)
    start = 0
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start = state["epoch"]
    for epoch in range(start, args.epochs):
        began = time.perf_counter()
        generator = torch.Generator().manual_seed(args.seed * 1000 + epoch)
        images = cifar10.augment(train_images, generator)
        order = torch.randperm(len(images), generator=generator)[: steps * args.batch]
        model.train()
        total = 0.0
        for index in order.split(args.batch):
            x = images[index].contiguous(memory_format=torch.channels_last)
            loss = functional.cross_entropy(model(x), train_labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        row = {
            "epoch": epoch + 1,
            "train_loss": round(total / steps, 4),
            "test_top1": accuracy(model, test_images, test_labels),
            "seconds": round(time.perf_counter() - began, 1),
        }
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        torch.save({**state, "epoch": epoch + 1}, checkpoint.with_suffix(".tmp"))
        os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
        with (args.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        print(row, flush=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, args.out / "resnet20_cifar10.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--out", type=Path, required=True, help="folder of this run: checkpoint, log, weights")
    parser.add_argument("--epochs", type=int, default=28)
    parser.add_argument("--batch", type=int, default=128, help="images per step")
    parser.add_argument("--lr", type=float, default=0.4, help="peak learning rate of the one-cycle schedule")
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
