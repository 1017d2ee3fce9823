"""The second estimate, from images near the first one."""

from dataclasses import replace

import pytest
import torch

from r2f_ext.audit.metrics import psnr_db
from r2f_ext.data import ImageSet, content_hashes, load_images
from r2f_ext.errors import R2FError
from r2f_ext.inversion import label_by_label
from r2f_ext.inversion.label_by_label import candidates_nearby, invert_by_label, invert_nearby
from r2f_ext.inversion.near_images import VARIANTS
from r2f_ext.pairs import GeneratedPairs
from r2f_ext.types import Reconstruction


@pytest.fixture(autouse=True)
def fewer_pairs(monkeypatch):
    monkeypatch.setattr(label_by_label, "NEAR_LEAST", 400)


@pytest.fixture
def victims(bound):
    """(target, A, private images, their updates, public images of the labels)."""
    target, adapter = bound
    private = load_images("embedded", role="private", count=5).take(torch.tensor([1, 2, 3, 4]))
    assert private.labels.tolist() == [2, 1, 1, 6]
    (batch,) = GeneratedPairs(target, adapter.a, private).batches()
    public = load_images("embedded", count=1500)
    return target, adapter.a, private, batch.updates, public


@pytest.fixture
def recorded(monkeypatch):
    """The image sets that pairs are made of."""
    sets, made = [], label_by_label._inverter

    def recording(target, a, proxy, *others):
        sets.append(proxy)
        return made(target, a, proxy, *others)

    monkeypatch.setattr(label_by_label, "_inverter", recording)
    return sets


def near(private: ImageSet, copies: int, noise: float) -> ImageSet:
    """Noisy copies of the private images, with labels that say nothing."""
    images = private.batch(slice(None)).repeat(copies, 1, 1, 1)
    noisy = images + noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    bytes_ = noisy.clamp(0, 1).mul(255).round().byte()
    return ImageSet("near", bytes_, torch.zeros(len(images), dtype=torch.int64), random_labels=True)


def test_images_near_the_victims_sharpen_the_estimate(victims):
    target, a, private, observed, public = victims
    originals = private.batch(slice(None))
    first = invert_by_label(target, a, public, observed, labels=private.labels).reconstruction
    told = []
    second = invert_nearby(target, a, public, observed, first, near(private, 60, 0.1), advance=told.append)
    before, after = psnr_db(first.images, originals), psnr_db(second.images, originals)
    assert (after > before + 2).all()
    assert torch.equal(second.labels, first.labels) and second.loo_errors.keys() == first.loo_errors.keys()
    for label, errors in second.loo_errors.items():  # of the second regression, which is closer
        assert errors.square().mean() < first.loo_errors[label].square().mean()
    assert sum(told) == candidates_nearby(public, private.labels, near(private, 60, 0.1)) == 240
    assert f"from {second.details['near_pairs']:.0f} public images that are near" in second.why


def test_variants_of_public_images_sharpen_the_estimate(victims, recorded):
    """Of the label's images alone, as many as the least that is set."""
    target, a, private, observed, public = victims
    originals, told = private.batch(slice(None)), []
    first = invert_by_label(target, a, public, observed, labels=private.labels).reconstruction
    second = invert_nearby(target, a, public, observed, first, advance=told.append)
    assert psnr_db(second.images, originals).mean() > psnr_db(first.images, originals).mean() + 0.3
    counts = {label: int((public.labels == label).sum()) for label in (1, 2, 6)}
    assert sum(told) == candidates_nearby(public, private.labels, None) == VARIANTS * sum(counts.values())
    for label, used in zip(counts, recorded[3:], strict=True):
        assert used.labels.unique().tolist() == [label]
        assert 200 <= len(used) <= label_by_label.NEAR_LEAST and counts[label] < 200


def test_private_images_among_the_candidates_are_not_used(victims, recorded):
    target, a, private, observed, public = victims
    first = Reconstruction("", private.batch(slice(None)), private.labels, "", 0.0)
    pool = near(private, 30, 0.1)
    pool = replace(pool, images=torch.cat([private.images, pool.images]), labels=torch.zeros(124, dtype=torch.int64))
    secret = set(content_hashes(private.images))
    invert_nearby(target, a, public, observed, first, pool, private.images)
    assert not any(secret & set(content_hashes(used.images)) for used in recorded)
    recorded.clear()
    invert_nearby(target, a, public, observed, first, pool)
    assert any(secret & set(content_hashes(used.images)) for used in recorded)  # the check above can fail


def test_pairs_are_as_many_as_fit_into_memory(victims, recorded):
    target, a, private, observed, public = victims
    first = Reconstruction("", private.batch(slice(None)), private.labels, "", 0.0)
    found = invert_nearby(target, a, public, observed, first, most=60)
    assert [30 <= len(used) <= 60 for used in recorded] == [True] * 3 and len(recorded[1]) == 60
    assert 30 <= found.details["near_pairs"] <= 60


def test_many_victims_of_one_label_leave_the_others_their_pairs(victims, recorded):
    """Label 1 has two victims, the others one each; a limit holds for all victims of a label together."""
    target, a, private, observed, public = victims
    first = Reconstruction("", private.batch(slice(None)), private.labels, "", 0.0)
    invert_nearby(target, a, public, observed, first, near(private, 60, 0.1), most=50)
    assert [int(used.labels[0]) for used in recorded] == [1, 2, 6]
    assert [len(used) for used in recorded] == [50, 50, 50]
    recorded.clear()
    invert_nearby(target, a, public, observed, first, near(private, 60, 0.1), most=20)  # 20 for each of the two
    assert [len(used) for used in recorded] == [20, 20, 20]
    with pytest.raises(R2FError, match="pairs of only 19 images of a label fit into memory"):
        invert_nearby(target, a, public, observed, first, near(private, 60, 0.1), most=19)


def test_labels_that_say_nothing_share_their_candidates(victims, recorded):
    target, a, private, observed, _ = victims
    first, told, public = (
        Reconstruction("", private.batch(slice(None)), private.labels, "", 0.0),
        [],
        near(private, 9, 0.1),
    )
    invert_nearby(target, a, public, observed, first, advance=told.append)
    assert sum(told) == candidates_nearby(public, private.labels, None) == VARIANTS * len(public)
    assert [int(used.labels[0]) for used in recorded] == [1, 2, 6]


def test_too_few_candidates_are_refused(victims):
    target, a, private, observed, public = victims
    first = Reconstruction("", private.batch(slice(None)), private.labels, "", 0.0)
    with pytest.raises(R2FError, match="at least 20 proxy pairs, got 8"):
        invert_nearby(target, a, public, observed, first, near(private, 2, 0.1))
