"""The generator: determinism, range and variety."""

import pytest
import torch

from r2f_ext.data import FAMILIES, content_hashes, procedural_families, procedural_images, procedural_labels
from r2f_ext.data.procedural import CHUNK
from r2f_ext.errors import R2FError


@pytest.fixture(scope="module")
def images():
    return procedural_images(CHUNK + 88, seed=3)


def test_same_seed_same_images(images):
    assert torch.equal(procedural_images(len(images), seed=3), images)


@pytest.mark.parametrize("count", [0, 1, 77, CHUNK, CHUNK + 1])
def test_prefix_does_not_depend_on_count(images, count):
    assert torch.equal(procedural_images(count, seed=3), images[:count])


def test_images_are_distinct_within_and_between_seeds(images):
    other = procedural_images(CHUNK, seed=4)
    hashes = content_hashes(images) + content_hashes(other)
    assert len(set(hashes)) == len(hashes)


def test_mix_of_gray_color_and_black_backgrounds(images):
    gray = (images == images[:, :1]).flatten(1).all(1).float().mean()
    assert 0.5 < gray < 0.95
    pixels = images.float() / 255
    empty = (images == 0).float().flatten(1).mean(1)
    assert 0.1 < (empty > 0.3).float().mean() < 0.6
    assert (pixels.flatten(1).std(1) > 0.02).float().mean() > 0.97
    assert 0.2 < pixels.mean() < 0.7


def test_families_are_those_of_the_images(images):
    """Objects, and hardly anything else, lie on exactly black backgrounds."""
    families = procedural_families(len(images), seed=3)
    objects = families == FAMILIES.index("objects")
    empty = (images == 0).float().flatten(1).mean(1) > 0.2
    assert empty[objects].float().mean() > 0.8 and empty[~objects].float().mean() < 0.1
    assert torch.equal(procedural_families(77, seed=3), families[:77])
    assert torch.unique(families).tolist() == list(range(len(FAMILIES)))


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 16, 40), (3, 65, 33)])
def test_other_shapes(shape):
    made = procedural_images(9, shape, seed=1)
    assert made.shape == (9, *shape) and made.dtype == torch.uint8
    assert made.float().flatten(1).std(1).min() > 0


def test_large_images_are_prefix_stable():
    assert torch.equal(procedural_images(3, (3, 224, 224)), procedural_images(12, (3, 224, 224))[:3])


@pytest.mark.parametrize(
    ("count", "shape", "seed"), [(-1, (3, 32, 32), 0), (4, (2, 32, 32), 0), (4, (3, 4, 32), 0), (4, (3, 32, 32), -1)]
)
def test_bad_requests(count, shape, seed):
    with pytest.raises(R2FError, match="procedural images need"):
        procedural_images(count, shape, seed)


def test_labels():
    labels = procedural_labels(3000, 7, seed=2)
    assert labels.dtype == torch.int64 and labels.unique().tolist() == list(range(7))
    assert torch.equal(procedural_labels(50, 7, seed=2), labels[:50])
    assert not torch.equal(procedural_labels(3000, 7, seed=3), labels)
    assert procedural_labels(0, 7).shape == (0,)
