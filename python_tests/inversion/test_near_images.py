"""The choice of public images near an estimate, and the variants that they are chosen among."""

from types import SimpleNamespace

import pytest
import torch
from torchvision.transforms.v2 import functional as transforms

from r2f_ext.data import ProceduralStream, procedural_images
from r2f_ext.inversion import near_images as module
from r2f_ext.inversion.near_images import VARIANTS, generated_nearby, near_images, streamed, variants


@pytest.fixture
def pool():
    return torch.randint(0, 256, (300, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.mark.parametrize("chunk", [7, 64, 300])
def test_the_nearest_are_those_of_a_full_sort(pool, chunk):
    estimates = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    counts = torch.tensor([20, 1, 20, 7, 30])
    images, places = near_images(pool.split(chunk), estimates, counts)
    order = (estimates[:, None].double() - pool.double() / 255).square().flatten(2).sum(2).argsort(1)
    exact = [row[:count] for row, count in zip(order, counts, strict=True)]
    assert images.dtype == torch.uint8 and len(images) == len(torch.cat(exact).unique())
    for found, expected in zip(places, exact, strict=True):
        assert torch.equal(images[found], pool[expected])


def test_with_fewer_candidates_all_are_taken(pool):
    images, places = near_images(pool[:10].split(4), torch.rand(2, 3, 8, 8), torch.tensor([20, 20]))
    assert torch.equal(images, pool[:10]) and all(place.sort().values.tolist() == [*range(10)] for place in places)


def test_variants_are_flipped_and_shifted_images(pool, monkeypatch):
    monkeypatch.setattr(module, "GAINS", (1.0, 1.0))
    monkeypatch.setattr(module, "CHUNK", 128)
    pool = torch.cat([pool, pool[:9]])
    chunks = list(variants(pool, torch.arange(300)))
    assert max(map(len, chunks)) == 128
    pool = pool[:300]
    made = torch.cat(chunks).unflatten(0, (VARIANTS, len(pool)))
    assert torch.equal(made[0], pool)
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    expected = [
        transforms.affine(image, angle=0, translate=[right, down], scale=1, shear=[0])[inner]
        for image in (pool, transforms.hflip(pool))
        for down in (-1, 0, 1)
        for right in (-1, 0, 1)
    ]
    found = [one[inner] for one in made]
    for image in expected:  # each of them once
        matches = [number for number, one in enumerate(found) if torch.equal(one, image)]
        assert len(matches) == 1
        found.pop(matches[0])
    assert not found


def test_gains_vary_and_are_the_same_in_every_call(pool):
    first, again = (torch.cat(list(variants(pool, torch.arange(len(pool))))) for _ in range(2))
    assert torch.equal(first, again) and torch.equal(first[: len(pool)], pool)
    flipped = first.unflatten(0, (VARIANTS, len(pool)))[VARIANTS // 2]  # not shifted
    gains = flipped.float().flatten(1).sum(1) / pool.float().flatten(1).sum(1)
    assert 0.7 < gains.min() < 0.85 and 1.1 < gains.max() < 1.3  # above 1, some pixels are clamped


def test_generated_candidates_are_the_stream_s_images():
    small = ProceduralStream(600, (3, 8, 8), 10)
    assert torch.equal(torch.cat(list(streamed(small, (3, 8, 8)))), procedural_images(600, (3, 8, 8)))


def test_large_images_are_compared_in_smaller_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 40)
    images = torch.zeros(30, 1, 64, 96, dtype=torch.uint8)
    assert {len(chunk) for chunk in variants(images, torch.arange(30))} == {20, 10}


def test_of_large_images_fewer_are_generated():
    def count(*shape):
        base = SimpleNamespace(input_shape=shape, num_classes=10, device="cpu")
        assert generated_nearby(base, "fashion-mnist") is None
        return len(generated_nearby(base, "procedural"))

    assert count(3, 32, 32) == count(1, 16, 16) == module.GENERATED
    assert count(3, 64, 64) == module.GENERATED // 4
