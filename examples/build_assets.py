"""Write r2f_ext/data/assets/: the Fashion-MNIST subset that ships in the package.

    python examples/build_assets.py

Proxy: 10,000 train images drawn by the seed. Train images that equal a test image, or that nearly equal a private
image, are left out. Private: test images 0-99. Each set is one PNG mosaic with its labels in a text chunk; the same
seed gives the same pixels. Needs the full data set (Debian's dataset-fashion-mnist, or torchvision's downloader).
"""

from __future__ import annotations

import argparse

import torch

from r2f_ext.data.fashion_mnist import load_fashion_mnist
from r2f_ext.data.image_set import unseen_rows
from r2f_ext.data.load import PRIVATE_ASSET, PROXY_ASSET
from r2f_ext.data.mosaic import write_mosaic

PRIVATE_COUNT = 100


def far_rows(images: torch.Tensor, private: torch.Tensor, least: float) -> torch.Tensor:
    """Indices of `images` (uint8 [n, h, w]) whose RMS difference to every private image is over `least` gray levels."""
    secret = private.flatten(1).float()
    nearest = [torch.cdist(part.flatten(1).float(), secret).amin(1) for part in images.split(5000)]
    rms = torch.cat(nearest) / secret.shape[1] ** 0.5
    return torch.nonzero(rms > least).flatten()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--least-rms", type=float, default=12.0, help="gray levels; nearer train images are left out")
    options = parser.parse_args()

    images, labels = load_fashion_mnist("train")
    test_images, test_labels = load_fashion_mnist("test")
    private = test_images[:PRIVATE_COUNT]
    other = unseen_rows(images, test_images)
    far = far_rows(images[other], private, options.least_rms)
    print(f"left out: {len(images) - len(other)} exact, {len(other) - len(far)} near matches")
    allowed = other[far]
    chosen = allowed[torch.randperm(len(allowed), generator=torch.Generator().manual_seed(options.seed))]
    chosen = chosen[: options.count]
    write_mosaic(PROXY_ASSET, images[chosen], labels[chosen])
    write_mosaic(PRIVATE_ASSET, private, test_labels[:PRIVATE_COUNT])
    for path in (PROXY_ASSET, PRIVATE_ASSET):
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
