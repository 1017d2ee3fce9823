"""Kernel ridge from updates to images, against a world whose answer is known."""

from dataclasses import replace

import pytest
import torch

from r2f_ext.data import load_images
from r2f_ext.errors import R2FError
from r2f_ext.inversion import amortised
from r2f_ext.inversion.amortised import AmortisedInverter
from r2f_ext.inversion.label_by_label import invert_by_label, proxy_of_label
from r2f_ext.pairs import GeneratedPairs, Training, simulate


@pytest.fixture
def world():
    """Updates of two layers that are linear in the pixels and the label."""
    generator = torch.Generator().manual_seed(4)
    labels = torch.randint(0, 4, (300,), generator=generator)
    images = torch.rand(300, 1, 3, 3, generator=generator)
    facts = torch.cat([images.flatten(1) - 0.5, 2 * torch.nn.functional.one_hot(labels, 4).float()], dim=1)
    layers = {"a": (6, 4), "b": (10, 2)}
    updates = {
        name: (facts @ torch.randn(13, rows * rank, generator=generator)).unflatten(1, (rows, rank))
        for name, (rows, rank) in layers.items()
    }
    return updates, images, labels


def part(updates, rows):
    return {name: update[rows] for name, update in updates.items()}


def test_training_pairs_come_back_when_lambda_is_tiny(world, monkeypatch):
    monkeypatch.setattr(amortised, "RIDGES", (1e-6,))
    updates, images, labels = world
    updates = {name: u[:60].double() for name, u in updates.items()}
    found = AmortisedInverter(updates, images[:60].double(), labels[:60], 4).invert(updates)
    torch.testing.assert_close(found.images.float(), images[:60], rtol=0, atol=2e-3)
    assert torch.equal(found.labels, labels[:60])


def test_held_out_images_and_labels(world):
    updates, images, labels = world
    inverter = AmortisedInverter(part(updates, slice(0, 250)), images[:250], labels[:250], 4)
    found = inverter.invert(part(updates, slice(250, 300)))
    error = (found.images - images[250:]).square().mean()
    assert error < 0.25 * (images[:250].mean(0) - images[250:]).square().mean()
    assert (found.labels == labels[250:]).float().mean() > 0.9
    assert found.images.shape == (50, 1, 3, 3) and found.images.min() >= 0 and found.images.max() <= 1
    assert abs(found.details["held_out_psnr_db"] + 10 * torch.log10(error)) < 4


def test_the_scale_of_an_update_plays_no_part(world):
    updates, images, labels = world
    inverter = AmortisedInverter(part(updates, slice(0, 250)), images[:250], labels[:250], 4)
    asked = part(updates, slice(250, 260))
    small = {name: 1e-7 * update for name, update in asked.items()}
    torch.testing.assert_close(inverter.invert(small).images, inverter.invert(asked).images, rtol=1e-3, atol=1e-4)


def test_it_is_kernel_ridge_written_out(world):
    updates, images, labels = world
    train = part(updates, slice(0, 100))
    inverter = AmortisedInverter(train, images[:100], labels[:100], 4)
    asked = part(updates, slice(200, 205))

    def kernel(x, y):
        cosines = [
            torch.nn.functional.cosine_similarity(x[n].flatten(1)[:, None], y[n].flatten(1)[None], dim=2) for n in x
        ]
        return torch.exp(-2 * inverter.choice.gamma * (1 - torch.stack(cosines).mean(0))).double()

    pixels = images[:100].flatten(1).double()
    damped = kernel(train, train) + inverter.choice.ridge * torch.eye(100)
    expected = kernel(asked, train) @ torch.linalg.solve(damped, pixels - pixels.mean(0)) + pixels.mean(0)
    found = inverter.invert(asked).images.flatten(1).double()
    torch.testing.assert_close(found, expected.clamp(0, 1), rtol=1e-3, atol=1e-3)


def test_a_stranger_is_flagged(world):
    updates, images, labels = world
    inverter = AmortisedInverter(part(updates, slice(0, 250)), images[:250], labels[:250], 4)
    assert inverter.far_from_proxy({n: torch.randn(8, *u.shape[1:]) for n, u in updates.items()}).all()
    assert inverter.far_from_proxy(part(updates, slice(250, 300))).float().mean() < 0.3
    mixed = {n: torch.cat([u[250:251], torch.randn(1, *u.shape[1:])]) for n, u in updates.items()}
    assert inverter.far_from_proxy(mixed).tolist() == [False, True]


def test_nineteen_pairs_are_too_few(world):
    updates, images, labels = world
    with pytest.raises(R2FError, match="at least 20 proxy pairs, got 19"):
        AmortisedInverter(part(updates, slice(0, 19)), images[:19], labels[:19], 4)


def test_a_label_with_pairs_enough_is_inverted_from_its_own_pairs_alone(world):
    updates, images, labels = world
    rows = torch.arange(300) % 2 == 0
    labels = torch.where(rows, 0, labels)
    facts = torch.cat([images.flatten(1) - 0.5, 2 * torch.nn.functional.one_hot(labels, 4).float()], dim=1)
    generator = torch.Generator().manual_seed(5)
    # Each label has a linear map of its own, as the sign and direction of a gradient differ by label.
    maps = torch.randn(4, 13, 40, generator=generator)
    updates = {"a": torch.einsum("nk,nkd->nd", facts, maps[labels])}
    inverter = AmortisedInverter(part(updates, slice(0, 260)), images[:260], labels[:260], 4)
    asked = torch.arange(260, 300)[labels[260:] == 0]
    found = inverter.invert(part(updates, asked))
    assert (found.labels == 0).all() and found.details["pairs_a_victim"] == (labels[:260] == 0).sum()
    alone = labels[:260] == 0
    other = AmortisedInverter(
        {n: u[:260][alone] for n, u in updates.items()}, images[:260][alone], labels[:260][alone], 4
    )
    torch.testing.assert_close(found.images, other.invert(part(updates, asked)).images, rtol=1e-4, atol=1e-4)


def test_pairs_made_for_each_label_give_what_one_inverter_gives(bound, proxy):
    target, adapter = bound
    labelled = proxy.take(torch.arange(150))
    labelled = replace(labelled, labels=torch.full((150,), 3))
    pairs = GeneratedPairs(target, adapter.a, labelled)
    updates = {n: torch.cat([b.updates[n] for b in pairs.batches()]) for n in target.names}
    observed = {n: u[[4, 9]] for n, u in updates.items()}
    made = []
    found = invert_by_label(target, adapter.a, labelled, observed, made.append)
    expected = AmortisedInverter(updates, labelled.batch(slice(None)), labelled.labels, 10).invert(observed)
    assert found.reconstruction.labels.tolist() == [3, 3] and sum(made) == 300
    assert not found.far_from_proxy.any()
    torch.testing.assert_close(found.reconstruction.images, expected.images, rtol=1e-3, atol=1e-3)


def test_pairs_are_trained_by_the_victims_recipe(bound):
    """One plain step gives the same pairs by either way; AdamW's signs are another map from images to updates."""
    target, adapter = bound
    public, private = load_images("embedded", count=300), load_images("embedded", role="private", count=8)
    public, private = public.relabelled(3), private.relabelled(3)
    images, labels = private.batch(slice(None))[:, None], private.labels[:, None]

    def estimates(recipe, training):
        victims = simulate(target, adapter.a, images, labels, recipe)
        observed = {name: -b for name, b in victims.b.items()}
        return invert_by_label(target, adapter.a, public, observed, training=training).reconstruction.images

    plain, adamw = Training(), Training(optimizer="adamw", lr=1e-3)
    torch.testing.assert_close(estimates(plain, plain), estimates(plain, None), rtol=1e-3, atol=1e-3)
    wrong, right = ((estimates(adamw, each) - images[:, 0]).square().mean() for each in (None, adamw))
    assert right < 0.9 * wrong


def test_images_with_random_labels_serve_every_label():
    random, true = load_images("procedural", count=30), load_images("embedded", count=3000)
    assert (proxy_of_label(random, 4).labels == 4).all() and len(proxy_of_label(random, 4)) == 30
    own = proxy_of_label(true, 4)
    assert len(own) == (true.labels == 4).sum() and (own.labels == 4).all()
    assert proxy_of_label(true.take(torch.arange(50)), 4).labels.unique().numel() > 1


def test_a_face_is_far_from_clothes_and_clothes_are_not(bound):
    target, adapter = bound
    proxy, clothes = load_images("embedded", count=600), load_images("embedded", role="private", count=20)
    faces = load_images("lfw", role="private", count=20)

    def updates(images):
        batches = list(GeneratedPairs(target, adapter.a, images).batches())
        return {n: torch.cat([b.updates[n] for b in batches]) for n in target.names}

    inverter = AmortisedInverter(updates(proxy), proxy.batch(slice(None)), proxy.labels, 10)
    assert inverter.far_from_proxy(updates(faces)).float().mean() > 0.9
    assert inverter.far_from_proxy(updates(clothes)).float().mean() < 0.3


def test_labels_that_a_saved_head_tells_are_used(bound, pairs):
    (batch,) = pairs.batches(0, 100)
    updates = {name: update.flatten(1) for name, update in batch.updates.items()}
    inverter = AmortisedInverter(updates, batch.images[:, 0], batch.labels[:, 0], 10)
    victims = {name: update[:3] for name, update in batch.updates.items()}
    own = inverter.find_labels(victims)
    known = torch.stack([own[0] * 0 - 1, (own[1] + 1) % 10, own[2]])
    found = inverter.invert(victims, known)
    assert found.labels.tolist() == [int(own[0]), int(known[1]), int(own[2])]
    assert "2 of 3 labels read from a saved head" in found.why
    assert torch.equal(inverter.invert(victims, known.clamp_min(0)).labels, known.clamp_min(0))
    assert "saved head" not in inverter.invert(victims).why
