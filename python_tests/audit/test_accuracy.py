"""Figures beside a decoder's: what needs no decoder, what to expect of the victims, and their truth."""

import pytest
import torch
from cases import cosine

from r2f_ext.audit import accuracy
from r2f_ext.audit.accuracy import class_mean_cosines, estimated_cosine, similarity, true_cosines
from r2f_ext.capture import Capture
from r2f_ext.data import load_images
from r2f_ext.decoders import Ridge, held_out_cosines
from r2f_ext.pairs import GeneratedPairs
from r2f_ext.types import Gradient

FITTED, HELD_OUT = 120, 40


@pytest.fixture(scope="module")
def fitted(pairs):
    """A ridge decoder on clothes, the pairs' updates [160, d_out, r], and its cosines on held-out clothes."""
    decoder = Ridge()
    decoder.fit(pairs, FITTED)
    updates = {n: torch.cat([b.updates[n] for b in pairs.batches()]) for n in pairs.target.names}
    asked = {n: u[FITTED:] for n, u in updates.items()}
    found = held_out_cosines(decoder.decode(asked), pairs, FITTED, FITTED + HELD_OUT)
    near = similarity(asked, {n: u[:FITTED].flatten(1) for n, u in updates.items()})
    return decoder, updates, near, found.cosine


def test_the_estimate_for_victims_holds_for_clothes_and_for_faces(fitted, pairs):
    """Fitted on clothes: faces are decoded worse, and nothing is promised of them; for clothes it is their truth."""
    decoder, updates, near, cosines = fitted
    known = {n: u[:FITTED].flatten(1) for n, u in updates.items()}
    truths, estimates = {}, {}
    for name, images in (
        ("clothes", load_images("embedded", role="private", count=12)),
        ("faces", load_images("lfw", role="private", count=12)),
    ):
        source = GeneratedPairs(pairs.target, pairs.a, images)
        asked = {n: torch.cat([b.updates[n] for b in source.batches()]) for n in pairs.target.names}
        truth = held_out_cosines(decoder.decode(asked), source, 0, len(images)).cosine
        where = similarity(asked, known)
        for layer, true in truth.items():
            estimate = estimated_cosine(near, cosines[layer], where)
            truths.setdefault(name, []).append(float(true.mean()))
            estimates.setdefault(name, []).append(estimate)
    held_out = torch.stack([cosines[layer].mean() for layer in truth]).mean()
    assert held_out - torch.tensor(truths["faces"]).mean() > 0.1 and set(estimates["faces"]) == {None}
    assert abs(torch.tensor(estimates["clothes"]) - torch.tensor(truths["clothes"])).mean() < 0.03


def test_the_line_is_least_squares_and_stays_a_cosine():
    near, cosines = torch.tensor([0.2, 0.4, 0.6, 0.8]), torch.tensor([0.3, 0.5, 0.7, 0.9])
    assert estimated_cosine(near, cosines, torch.tensor([0.3, 0.5])) == pytest.approx(0.5, abs=1e-6)
    assert estimated_cosine(near, cosines, near + 9) == 1
    flat = torch.full((4,), 0.5)
    assert estimated_cosine(flat, cosines, torch.tensor([0.6])) == pytest.approx(0.6)  # nothing to learn from: the mean


def test_nothing_is_estimated_of_victims_unlike_the_held_out_pairs():
    """Up to a quarter below their 5th percentile are left to chance; more are another kind of images."""
    near, cosines = torch.linspace(0, 1, 101), torch.linspace(0.5, 1, 101)
    like, unlike = torch.full((3,), 0.5), torch.tensor([0.04])
    assert (
        estimated_cosine(near, cosines, unlike) is None and estimated_cosine(near, cosines, unlike + 0.02) is not None
    )
    assert estimated_cosine(near, cosines, torch.cat([like, unlike])) is not None
    assert estimated_cosine(near, cosines, torch.cat([like, unlike, unlike])) is None


def test_similarity_is_the_largest_mean_cosine(fitted):
    _, updates, _, _ = fitted
    known = {n: u[:5].flatten(1) for n, u in updates.items()}
    asked = {n: torch.cat([3 * u[2:3], u[130:131]]) for n, u in updates.items()}
    expected = torch.stack([cosine(known[n], asked[n][1:].flatten(1)) for n in known]).mean(0).max()
    assert similarity(asked, known).tolist() == pytest.approx([1.0, float(expected)], abs=1e-4)


def test_the_class_mean_is_the_mean_gradient_of_the_labels_fitted_pairs(pairs, proxy, monkeypatch):
    monkeypatch.setattr(accuracy, "CLASSES", 2)
    monkeypatch.setattr(accuracy, "LEAST_OF_CLASS", 5)
    labels = proxy.labels
    found = class_mean_cosines(pairs, labels, FITTED, HELD_OUT)
    values, counts = labels[FITTED:].unique(return_counts=True)
    frequent = values[counts.argsort(descending=True, stable=True)[:2]]
    for name in pairs.target.names:
        dense = torch.cat([b.gradients.dense(name) for b in pairs.batches()])
        parts = []
        for label in frequent:
            mean = dense[:FITTED][labels[:FITTED] == label].mean(0)
            true = dense[FITTED:][labels[FITTED:] == label]
            parts.append(cosine(true, mean.expand_as(true)))
        assert found[name] == pytest.approx(float(torch.cat(parts).mean()), abs=1e-4)


def test_classes_with_few_pairs_have_no_mean(pairs, proxy):
    assert class_mean_cosines(pairs, torch.arange(160), FITTED, HELD_OUT) == {}


def test_true_cosines_are_with_the_gradient_of_the_true_image(pairs, private):
    with Capture(pairs.target) as capture:
        true = capture(private.batch(slice(None))[:, None], private.labels[:, None])
    noise = Gradient({n: torch.randn_like(true.dense(n)) for n in pairs.target.names})
    guesses = {
        "right": lambda name, victim: 7 * true.dense(name)[victim],
        "wrong": lambda name, victim: -true.dense(name)[victim],
        "noise": lambda name, victim: noise.dense[name][victim],
    }
    for kinds in true_cosines(pairs.target, guesses, private.batch(slice(None)), private.labels).values():
        torch.testing.assert_close(kinds["right"], torch.ones(3), rtol=0, atol=1e-4)
        torch.testing.assert_close(kinds["wrong"], -torch.ones(3), rtol=0, atol=1e-4)
        assert kinds["noise"].abs().max() < 0.1
