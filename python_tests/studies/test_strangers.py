import numpy as np
import pytest
import torch

from r2f_ext.errors import R2FError
from r2f_ext.studies import CLOTHES, Row
from r2f_ext.studies.scene import base_of, private_images, public_images, strangers_of
from r2f_ext.studies.strangers import clearly_above, joined, nearest_db, public_parts

CPU = torch.device("cpu")


def test_public_parts_are_disjoint_and_a_small_set_is_refused():
    base = base_of("embedded", CPU)
    parts = public_parts(base, CLOTHES, 0, (30, 0, 20))
    assert [len(part) for part in parts] == [30, 0, 20]
    assert torch.equal(joined(parts[0], parts[2]).images, public_images(base, CLOTHES, 0, 50).images)
    with pytest.raises(R2FError, match=r"'embedded' has [0-9]+ public images, and 14000 are needed: add images"):
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
