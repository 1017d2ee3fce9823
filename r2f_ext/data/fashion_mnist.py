"""Fashion-MNIST (Xiao et al. 2017, MIT licence) from Debian's package or torchvision's downloader."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import FashionMNIST

from r2f_ext.errors import R2FError
from r2f_ext.files import cache_folder

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


def load_fashion_mnist(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (images uint8 [n, 28, 28], labels int64 [n]) of `split`, "train" or "test".

    Debian's package `dataset-fashion-mnist` is used if it is installed; otherwise torchvision downloads the data set
    into `$R2F_DATA` (default `~/.cache/r2f_ext`).

    Raises:
        R2FError: the data set is neither installed nor can it be downloaded.
    """
    prefix = {"train": "train", "test": "t10k"}[split]
    path = DEBIAN_FOLDER / f"{prefix}-images-idx3-ubyte.gz"
    if path.exists():
        pixels = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=16)
        labels = np.frombuffer(
            gzip.decompress(path.with_name(f"{prefix}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8
        )
        return torch.from_numpy(pixels.reshape(-1, 28, 28).copy()), torch.from_numpy(labels.astype(np.int64))
    return _from_torchvision(split)


def _from_torchvision(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    folder = cache_folder()
    try:
        data = FashionMNIST(str(folder), train=split == "train", download=True)
    except Exception as error:  # RuntimeError, URLError or OSError, depending on the version
        raise R2FError(
            "Fashion-MNIST is not on this machine and could not be downloaded: install Debian's "
            "dataset-fashion-mnist, or use --proxy procedural or --proxy embedded."
        ) from error
    return data.data, data.targets.long()
