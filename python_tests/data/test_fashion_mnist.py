"""Fashion-MNIST from Debian's files, or by torchvision."""

import gzip

import numpy as np
import pytest
import torch
from image_cases import check

from r2f_ext.data import content_hashes, fashion_mnist, load_images
from r2f_ext.data.fashion_mnist import DEBIAN_FOLDER, load_fashion_mnist
from r2f_ext.errors import R2FError


@pytest.mark.skipif(not DEBIAN_FOLDER.exists(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_agrees_with_the_assets():
    private = load_images("fashion-mnist", count=100, role="private")
    shipped = load_images("embedded", role="private")
    assert torch.equal(private.images, shipped.images) and torch.equal(private.labels, shipped.labels)
    proxy = load_images("fashion-mnist", count=300)
    check(proxy, 300)
    assert not set(content_hashes(proxy.images)) & set(content_hashes(private.images))


def test_the_files_of_debian_are_read(tmp_path, monkeypatch):
    """The IDX format: big-endian magic number and sizes, then the bytes."""
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path)
    for split, prefix, count in (("train", "train", 5), ("test", "t10k", 3)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8)
        for name, magic, values in (("images-idx3", 2051, pixels), ("labels-idx1", 2049, labels)):
            head = np.array([magic, *values.shape], dtype=">i4").tobytes()
            (tmp_path / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(head + values.tobytes()))
        images, found = load_fashion_mnist(split)
        assert images.dtype == torch.uint8 and np.array_equal(images.numpy(), pixels)
        assert found.dtype == torch.int64 and found.tolist() == labels.tolist()


def test_what_cannot_be_downloaded_is_refused(tmp_path, monkeypatch):
    def offline(*args, **options):
        raise RuntimeError("offline")

    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path)
    monkeypatch.setattr(fashion_mnist, "FashionMNIST", offline)
    with pytest.raises(R2FError, match="could not be downloaded: install Debian's dataset-fashion-mnist"):
        load_images("fashion-mnist")
