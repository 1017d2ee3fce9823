"""Pretrain the embedded ViT on Fashion-MNIST train and write r2f_ext/models/assets/embedded_vit.safetensors.

    python examples/pretrain_embedded.py

Needs the full data set (Debian's dataset-fashion-mnist, or torchvision's downloader); about
10 minutes on two CPU cores. The trained head is replaced by a fresh one (see `reset_head`), since a
converged head gives near-zero gradients.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from r2f_ext.data.fashion_mnist import load_fashion_mnist
from r2f_ext.models.embedded import PIXEL_MEAN, PIXEL_STD, WEIGHTS, build_embedded_vit, reset_head


def to_input(images: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 28, 28] -> normalised float [n, 3, 32, 32]."""
    pixels = F.pad(images.float().div(255), (2, 2, 2, 2))[:, None]
    return ((pixels - PIXEL_MEAN[0]) / PIXEL_STD[0]).expand(-1, 3, -1, -1)


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    hits = [
        (model(to_input(x)).argmax(1) == y).sum() for x, y in zip(images.split(500), labels.split(500), strict=True)
    ]
    model.train()
    return float(sum(hits)) / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    images, labels = load_fashion_mnist("train")
    test_images, test_labels = load_fashion_mnist("test")
    model = build_embedded_vit()
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, weight_decay=0.05)
    steps_per_epoch = len(images) // options.batch
    total = options.epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, step / 200) * 0.5 * (1 + math.cos(math.pi * step / total))
    )
    start = time.time()
    for epoch in range(options.epochs):
        order = torch.randperm(len(images))
        for step in range(steps_per_epoch):
            batch = order[step * options.batch : (step + 1) * options.batch]
            loss = F.cross_entropy(model(to_input(images[batch])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch}: loss {loss.item():.3f}, {time.time() - start:.0f} s", flush=True)
    test_accuracy = accuracy(model, test_images, test_labels)
    reset_head(model)
    metadata = {
        "pretraining": f"Fashion-MNIST train, {options.epochs} epochs, seed {options.seed}",
        "test_accuracy_before_head_reset": f"{test_accuracy:.4f}",
    }
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, WEIGHTS, metadata=metadata)
    print(f"test accuracy {test_accuracy:.4f}; wrote {WEIGHTS.name}")


if __name__ == "__main__":
    main()
