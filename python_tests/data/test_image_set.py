"""Sets of images as bytes: batches, sizes, and the removal of private images from a proxy."""

import pytest
import torch

from r2f_ext.data import ImageSet, content_hashes, drop_private, fit_images, load_images
from r2f_ext.errors import R2FError


def test_drop_private(classes):
    proxy = load_images(str(classes))
    private = proxy.take(torch.tensor([1, 5]))
    left = drop_private(proxy, private)
    assert len(left) == 10 and "2 images" in left.notes[-1]
    assert not set(content_hashes(left.images)) & set(content_hashes(private.images))
    with pytest.raises(R2FError, match="at least 2 images"):
        drop_private(proxy, proxy)
    with pytest.raises(R2FError, match="differ in image shape"):
        drop_private(proxy, load_images(str(classes), input_shape=(1, 32, 32)))


def test_image_set_batches():
    loaded = load_images("embedded", role="private", count=5)
    pixels = loaded.batch([4, 0])
    assert pixels.dtype == torch.float32 and pixels.shape == (2, 3, 32, 32)
    assert torch.equal((pixels[1] * 255).round().to(torch.uint8), loaded.images[0])
    assert pixels.min() >= 0 and pixels.max() <= 1
    with pytest.raises(ValueError, match="uint8"):
        ImageSet("x", pixels, None)
    with pytest.raises(ValueError, match="one label"):
        ImageSet("x", loaded.images, loaded.labels[:2])
    with pytest.raises(ValueError, match="uint8"):
        content_hashes(pixels)


def test_fit_images():
    wide = torch.zeros(2, 3, 20, 60, dtype=torch.uint8)
    wide[..., 20:40] = 200
    assert fit_images(wide, (3, 40, 40))[..., 4:36].float().mean() > 190
    assert fit_images(wide, (1, 20, 20)).unique().tolist() == [200]
    assert fit_images(wide[:0], (1, 20, 20)).shape == (0, 1, 20, 20)
