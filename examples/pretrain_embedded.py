"""Pretrain the embedded ViT on Fashion-MNIST train and write r2f_ext/models/assets/embedded_vit.safetensors.

    python examples/pretrain_embedded.py

Needs the full data set (Debian's dataset-fashion-mnist, or torchvision's downloader); about
10 minutes on two CPU cores. The trained head is replaced by a fresh one (see `reset_head`), since a
converged head gives near-zero gradients.
"""

from __future__ import annotations

import argparse

from torch import Tensor

from r2f_ext.data import fit_images
from r2f_ext.data.fashion_mnist import load_fashion_mnist
from r2f_ext.files import write_tensors
from r2f_ext.models.embedded import WEIGHTS, reset_head
from r2f_ext.models.pretrain import Pretraining, classification_accuracy, pretrain


def fashion_mnist(split: str) -> tuple[Tensor, Tensor]:
    """Images uint8 [n, 1, 32, 32] and labels [n]."""
    images, labels = load_fashion_mnist(split)
    return fit_images(images[:, None], (1, 32, 32)), labels


def report(steps: int, line: str = "") -> None:
    if line:
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    images, labels = fashion_mnist("train")
    steps = options.epochs * (len(images) // options.batch)
    model = pretrain(images, labels, Pretraining(steps, options.batch, options.lr, options.seed), report)
    test_accuracy = classification_accuracy(model, *fashion_mnist("test"))
    reset_head(model)
    metadata = {
        "pretraining": f"Fashion-MNIST train, {options.epochs} epochs, seed {options.seed}",
        "test_accuracy_before_head_reset": f"{test_accuracy:.4f}",
    }
    write_tensors(WEIGHTS, model.state_dict(), metadata)
    print(f"test accuracy {test_accuracy:.4f}; wrote {WEIGHTS.name}")


if __name__ == "__main__":
    main()
