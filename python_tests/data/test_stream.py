"""A stream of procedural images against the set that is held whole."""

import pytest
import torch

from r2f_ext.data import ProceduralStream, load_images
from r2f_ext.data.procedural import chunk_size
from r2f_ext.errors import R2FError


def test_the_stream_gives_the_images_of_the_set():
    whole = load_images("procedural", count=600, num_classes=7, seed=3)
    stream = ProceduralStream(600, (3, 32, 32), 7, 3)
    assert len(stream) == 600 and torch.equal(stream.labels, whole.labels) and stream.name == whole.name
    for rows in (slice(100), slice(480, 530), slice(590, 900), slice(5, 590, 7)):
        assert torch.equal(stream.batch(rows), whole.batch(rows))
        assert len(stream._chunks) <= 2


def test_what_decides_the_images_decides_the_fingerprint():
    streams = [
        ProceduralStream(*made)
        for made in (
            (10, (3, 32, 32), 5, 0),
            (11, (3, 32, 32), 5, 0),
            (10, (1, 32, 32), 5, 0),
            (10, (3, 32, 32), 6, 0),
            (10, (3, 32, 32), 5, 1),
        )
    ]
    assert len({stream.fingerprint for stream in streams}) == 5
    assert ProceduralStream(10, (3, 32, 32), 5, 0).fingerprint == streams[0].fingerprint


def test_what_cannot_be_made_is_refused():
    with pytest.raises(R2FError, match="seed -1"):
        ProceduralStream(10, (3, 32, 32), 5, -1)
    with pytest.raises(R2FError, match="sides of at least 8"):
        ProceduralStream(10, (3, 4, 4), 5, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_stream_on_a_gpu_draws_its_own_images_the_same_for_a_seed_and_says_so():
    size = chunk_size((3, 32, 32), on_gpu=True)
    one, same, other = (ProceduralStream(2 * size, (3, 32, 32), 10, seed, "cuda") for seed in (0, 0, 1))
    rows = slice(size - 5, size + 7)
    assert torch.equal(one.batch(rows), same.batch(rows)) and not torch.equal(one.batch(rows), other.batch(rows))
    assert torch.equal(one.batch(rows)[5:], one.batch(slice(size, size + 7)))
    assert one.fingerprint != ProceduralStream(2 * size, (3, 32, 32), 10, 0).fingerprint
    images = one.batch(slice(2000))
    plain = load_images("procedural", count=2000).batch(slice(None))
    assert abs(float(images.mean()) - float(plain.mean())) < 0.02 and images.is_cuda


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_images_are_made_without_a_wait_for_the_gpu():
    ProceduralStream(64, (3, 32, 32), 10, 0, "cuda").batch(slice(64))  # libraries make their plans
    stream = ProceduralStream(64, (3, 32, 32), 10, 1, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        stream.batch(slice(64))
    finally:
        torch.cuda.set_sync_debug_mode("default")
