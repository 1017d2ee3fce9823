import numpy as np
import pytest
import torch

from r2f_ext.decoders import Ridge
from r2f_ext.errors import R2FError
from r2f_ext.pairs import SimulatedPairs, Training
from r2f_ext.studies import CLOTHES, Row
from r2f_ext.studies.scene import base_of, private_images, public_images, start_of, strangers_of, target_of
from r2f_ext.studies.strangers import (
    WrittenPairs,
    clearly_above,
    joined,
    nearest_db,
    public_parts,
)

CPU = torch.device("cpu")


def test_public_parts_are_disjoint_and_a_small_set_is_refused():
    base = base_of("embedded", CPU)
    parts = public_parts(base, CLOTHES, 0, (30, 0, 20))
    assert [len(part) for part in parts] == [30, 0, 20]
    assert torch.equal(joined(parts[0], parts[2]).images, public_images(base, CLOTHES, 0, 50).images)
    with pytest.raises(R2FError, match="add images"):
        public_parts(base, CLOTHES, 0, (9000, 5000))


def test_strangers_have_the_labels_and_are_others():
    base = base_of("embedded", CPU)
    (others,) = public_parts(base, CLOTHES, 0, (200,))
    images = private_images(base, CLOTHES, 0, 12)
    found = strangers_of(images, others, 0)
    assert torch.equal(found.labels, images.labels)
    for image, label in zip(found.images, found.labels, strict=True):
        same = (others.images == image).flatten(1).all(1)
        assert label in others.labels[same]


def test_nearest_db_is_the_largest_psnr():
    generator = torch.Generator().manual_seed(0)
    estimates, originals = torch.rand(2, 1, 4, 4, generator=generator), torch.rand(2, 3, 1, 4, 4, generator=generator)
    errors = ((estimates[:, None] - originals).numpy().astype(np.float64) ** 2).mean((2, 3, 4))
    np.testing.assert_allclose(nearest_db(estimates, originals).numpy(), -10 * np.log10(errors.min(1)), rtol=1e-6)


def test_a_decoder_of_written_pairs_is_that_of_their_source():
    base = base_of("embedded", CPU)
    target = target_of(base, 2, ["blocks.0.attn.proj", "blocks.3.mlp.fc1"])
    a = start_of(target, 0)
    (images,) = public_parts(base, CLOTHES, 0, (24,))
    pairs = SimulatedPairs(target, a, images, Training(steps=2))
    written = WrittenPairs(pairs, 24)
    assert len(written) == 24
    (batch,) = written.batches(3, 5)
    torch.testing.assert_close(batch.gradients.dense(target.names[0]), written.dense[target.names[0]][3:5])
    decoded = []
    for source in (pairs, written):
        ridge = Ridge(2e-3, 0.5)
        ridge.fit(source, 24)
        decoded.append(ridge.decode({name: each[:2] for name, each in written.updates.items()}))
    for name in target.names:
        torch.testing.assert_close(decoded[0].dense[name], decoded[1].dense[name], rtol=1e-3, atol=1e-6)


def test_clearly_above_needs_intervals_that_do_not_overlap():
    low, high, single = (
        Row({}, "m", (1.0, 2.0), 1.0, 2.0),
        Row({}, "m", (3.0, 4.0), 3.0, 4.0),
        Row({}, "m", (9.0,), None, None),
    )
    assert clearly_above(high, low)
    assert not clearly_above(low, high)
    assert not clearly_above(low, low)
    assert not clearly_above(single, low)
    assert not clearly_above(None, low)
