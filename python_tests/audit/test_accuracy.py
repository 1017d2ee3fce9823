"""Figures beside a decoder's: what needs no decoder, what to expect of the victims, and their truth."""

from dataclasses import asdict

import pytest
import torch
from cases import cosine

from r2f_ext.audit import accuracy
from r2f_ext.audit.accuracy import (
    CLASS_MEAN,
    ClassMeans,
    each,
    estimated_cosine,
    score_and_decode,
    similarity,
    true_cosines,
)
from r2f_ext.audit.run import generate
from r2f_ext.capture import Capture
from r2f_ext.data import load_images
from r2f_ext.decoders import Projection, Ridge, held_out_cosines, held_out_cosines_of_each, stack_updates
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


def class_means(pairs, labels):
    means = ClassMeans(labels, FITTED, HELD_OUT)
    means.start(pairs, FITTED)
    for batch in pairs.batches(0, FITTED):
        means.observe(batch)
    return means


def test_the_class_mean_is_the_mean_gradient_of_the_labels_fitted_pairs(pairs, proxy, monkeypatch):
    monkeypatch.setattr(accuracy, "CLASSES", 2)
    monkeypatch.setattr(accuracy, "LEAST_OF_CLASS", 5)
    monkeypatch.setattr(accuracy, "CLASS_PAIRS", 110)  # within a batch
    labels = proxy.labels
    means = class_means(pairs, labels)
    found = held_out_cosines_of_each({"mean": means.guess}, pairs, FITTED, FITTED + HELD_OUT)["mean"].cosine
    values, counts = labels[FITTED:].unique(return_counts=True)
    frequent = values[counts.argsort(descending=True, stable=True)[:2]]
    assert torch.equal(means.has_mean, torch.isin(labels[FITTED:], frequent))
    for name in pairs.target.names:
        dense = torch.cat([b.gradients.dense(name) for b in pairs.batches()])
        parts = []
        for label in frequent:
            mean = dense[:110][labels[:110] == label].mean(0)
            true = dense[FITTED:][labels[FITTED:] == label]
            parts.append(cosine(true, mean.expand_as(true)))
        expected = float(torch.cat(parts).mean())
        assert float(found[name][means.has_mean].mean()) == pytest.approx(expected, abs=1e-4)


def test_classes_with_few_pairs_have_no_mean(pairs):
    means = class_means(pairs, torch.arange(160))
    assert means.classes == [] and not means.has_mean.any()


def learners(pairs, labels):
    """Two decoders and the class means, fitted, and the updates of all pairs [160, d_out * r]."""
    fitted = {"projection": Projection(), "ridge": Ridge(), CLASS_MEAN: ClassMeans(labels, FITTED, HELD_OUT)}
    updates = generate(pairs, FITTED + HELD_OUT, fitted, FITTED, lambda units: None, {})
    for one in fitted.values():
        one.finish()
    return fitted, updates


def test_all_are_scored_in_one_pass_and_as_each_alone(pairs, proxy, bound, monkeypatch):
    monkeypatch.setattr(accuracy, "LEAST_OF_CLASS", 5)
    fitted, updates = learners(pairs, proxy.labels)
    walked = []
    batches = type(pairs).batches
    monkeypatch.setattr(type(pairs), "batches", lambda self, *part: walked.append(part) or batches(self, *part))
    rest = slice(FITTED, FITTED + HELD_OUT)
    scored = score_and_decode(pairs, fitted, updates, stack_updates([bound[1]]), rest, {})
    assert sorted(walked) == [(0, FITTED), (FITTED, FITTED + HELD_OUT)]  # the ridge's own pass, and one for the scores
    asked = {n: u[FITTED:].view(HELD_OUT, -1, pairs.target.layer(n).rank) for n, u in updates.items()}
    for kind in ("projection", "ridge"):
        expected = held_out_cosines(fitted[kind].decode(asked), pairs, rest.start, rest.stop).summary()
        for name, figures in expected.items():
            found = scored.figures[name][kind]
            for figure, value in asdict(figures).items():
                assert getattr(found, figure) == pytest.approx(value, abs=1e-5)
            assert found.floor_cosine == scored.figures[name]["projection"].cosine_mean
            assert 0 < found.class_mean_cosine < 1 and found.victim_true is None
    for name, gradient in fitted["ridge"].decode(stack_updates([bound[1]])).dense.items():
        torch.testing.assert_close(scored.decoded.dense[name], gradient, rtol=1e-3, atol=1e-7)
        assert scored.decoded.dense[name].untyped_storage().nbytes() == gradient.nbytes  # not a view of the held-out


def test_a_decoder_that_fails_is_left_out(pairs, proxy, bound, monkeypatch):
    fitted, updates = learners(pairs, proxy.labels)
    monkeypatch.setattr(Ridge, "decode", lambda self, updates: torch.linalg.cholesky(-torch.eye(3)))
    failed = {}
    rest = slice(FITTED, FITTED + HELD_OUT)
    scored = score_and_decode(pairs, fitted, updates, stack_updates([bound[1]]), rest, failed)
    assert list(failed) == ["ridge"] and failed["ridge"].startswith("a matrix cannot be decomposed (")
    assert scored.decoded is None and {kind for kinds in scored.figures.values() for kind in kinds} == {"projection"}


def test_one_that_fails_does_not_stop_the_others_and_a_bug_does():
    parts, failed = {"a": 1, "b": 0, "c": 2}, {}

    def step(part):
        if part == 0:
            raise MemoryError
        return 10 * part

    assert each(parts, failed, step) == {"a": 10, "c": 20}
    assert parts == {"a": 1, "c": 2} and failed == {"b": "out of memory."}
    with pytest.raises(ZeroDivisionError):
        each({"a": 0}, failed, lambda part: 1 / part)


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
