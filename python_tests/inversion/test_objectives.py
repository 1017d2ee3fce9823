"""Objectives against dense gradients written out by autograd."""

import pytest
import torch
import torch.nn.functional as F
from cases import CONV, LINEAR, samples, target_of, tiny_base

from r2f_ext.capture import Capture
from r2f_ext.inversion.objectives import Distance, GradientObjective, UpdateObjective
from r2f_ext.ops import reference
from r2f_ext.types import Gradient

NAMES = (CONV, *LINEAR)


def dense_by_autograd(base, image, label):
    weights = [base.model.get_submodule(name).weight.requires_grad_(True) for name in NAMES]
    loss = F.cross_entropy(base.model(base.normalize(image[None])), label[None])
    grads = torch.autograd.grad(loss, weights)
    for weight in weights:
        weight.requires_grad_(False)
    return {name: grad.flatten(1) for name, grad in zip(NAMES, grads, strict=True)}


def one_minus_cosine(x, y):
    return 1 - (x * y).sum() / x.norm() / y.norm()


def distance(objective, candidate, kind="layer_cosine", weights=None):
    """The objective for images without any variation."""
    gradients = candidate.dense if isinstance(candidate, Gradient) else candidate.x
    trials = len(next(iter(gradients.values())))
    weights = [1.0] * len(objective.shapes) if weights is None else weights
    return objective(candidate, torch.zeros(trials, 3, 4, 4), Distance(kind, weights))


@pytest.fixture
def world():
    base = tiny_base()
    target = target_of(base, NAMES)
    images, labels = samples(3, base)
    observed = {layer.name: 1e-3 * torch.randn(3, layer.d_out, layer.d_in).double() for layer in target.layers}
    a = {layer.name: torch.randn(layer.rank, layer.d_in).double() for layer in target.layers}
    return target, images, labels, observed, a


def candidate(target, images, labels, create_graph=False):
    with Capture(target) as capture:
        return capture(images[:, None], labels[:, None], create_graph=create_graph)


def test_gradient_cosine(world):
    target, images, labels, observed, _ = world
    found = distance(GradientObjective(Gradient(observed)), candidate(target, images, labels))
    for v in range(3):
        dense = dense_by_autograd(target.base, images[v], labels[v])
        expected = torch.stack([one_minus_cosine(dense[n], observed[n][v]) for n in NAMES]).mean()
        torch.testing.assert_close(found[v], expected, rtol=1e-9, atol=1e-12)


def test_update_cosine(world):
    target, images, labels, observed, a = world
    updates = {name: g @ a[name].mT for name, g in observed.items()}
    found = distance(UpdateObjective(target, a, updates), candidate(target, images, labels))
    for v in range(3):
        dense = dense_by_autograd(target.base, images[v], labels[v])
        expected = torch.stack([one_minus_cosine(dense[n] @ a[n].mT, updates[n][v]) for n in NAMES]).mean()
        torch.testing.assert_close(found[v], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["layer_cosine", "cosine", "l2"])
def test_dense_and_factored_forms_agree(world, kind):
    """Candidates as factors or written out give one and the same distance."""
    target, images, labels, _, a = world
    factors, seen = candidate(target, images, labels), candidate(target, images.flip(0), labels)
    dense, seen_dense = (Gradient({n: f.dense(n) for n in NAMES}) for f in (factors, seen))
    weights = [1.0, 2.0, 0.5]
    objective = GradientObjective(seen_dense)
    found = [distance(objective, each, kind, weights) for each in (factors, dense)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-7, atol=1e-12)
    objective = UpdateObjective(target, a, {n: g @ a[n].mT for n, g in seen_dense.dense.items()})
    torch.testing.assert_close(distance(objective, dense, kind, weights), distance(objective, factors, kind, weights))


def test_repeat_gives_each_trial_its_victim(world):
    target, images, labels, observed, a = world
    index = torch.tensor([0, 0, 1, 1, 2, 2])
    factors, twice = candidate(target, images, labels), candidate(target, images[index], labels[index])
    objectives = [
        GradientObjective(Gradient(observed)),
        UpdateObjective(target, a, {n: g @ a[n].mT for n, g in observed.items()}),
    ]
    for objective in objectives:
        torch.testing.assert_close(distance(objective.repeat(2), twice), distance(objective, factors)[index])
        assert objective.norms().shape == (3, len(NAMES))
        assert objective.shapes == {layer.name: (layer.d_out, layer.d_in) for layer in target.layers}
    one = GradientObjective(Gradient({n: g[:1] for n, g in observed.items()}))
    assert len(one.repeat(5).tensors()[0]) == 1


def test_the_truth_scores_zero_at_any_positive_scale(world):
    target, images, labels, _, a = world
    factors = candidate(target, images, labels)
    exact = {name: 7e-4 * factors.dense(name) for name in NAMES}
    assert distance(GradientObjective(Gradient(exact)), factors).abs().max() < 1e-9
    update = UpdateObjective(target, a, {n: g @ a[n].mT for n, g in exact.items()})
    assert distance(update, factors).abs().max() < 1e-9
    opposite = {name: -gradient for name, gradient in exact.items()}
    torch.testing.assert_close(distance(GradientObjective(Gradient(opposite)), factors), torch.full((3,), 2.0).double())


@pytest.mark.parametrize("kind", ["gradient", "update"])
def test_gradcheck(world, kind):
    target, images, labels, observed, a = world
    objective = GradientObjective(Gradient({n: g[:1] for n, g in observed.items()}))
    if kind == "update":
        objective = UpdateObjective(target, a, {n: g[:1] @ a[n].mT for n, g in observed.items()})

    def loss(pixels):
        image = images[:1].clone()
        image[:, :, 5:7, 3:6] = pixels
        return distance(objective, candidate(target, image, labels[:1], create_graph=True))

    assert torch.autograd.gradcheck(loss, [images[:1, :, 5:7, 3:6].clone().requires_grad_()], atol=1e-7)


def test_tiny_gradients_do_not_underflow(world):
    target, images, labels, _, _ = world
    factors = candidate(target, images, labels)
    small = {name: (1e-22 * factors.delta[name]).float() for name in NAMES}
    x = {name: factors.x[name].float() for name in NAMES}
    observed = {name: factors.dense(name).float() for name in NAMES}
    loss = distance(GradientObjective(Gradient(observed)), type(factors)(x, small))
    assert loss.abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["dense", "factored", "update"])
def test_total_variation_is_part_of_every_objective(world, kind):
    target, images, labels, observed, a = world
    found = candidate(target, images, labels)
    objective = GradientObjective(Gradient(observed))
    if kind == "update":
        objective = UpdateObjective(target, a, {n: g @ a[n].mT for n, g in observed.items()})
    if kind == "dense":
        found = Gradient({n: found.dense(n) for n in NAMES})
    pixels = images.clone().requires_grad_()
    for isotropic in (False, True):
        loss = objective(found, pixels, Distance("layer_cosine", [1.0, 1.0, 1.0], 0.3, isotropic))
        plain = distance(objective, found) + 0.3 * reference.total_variation(pixels, isotropic)
        torch.testing.assert_close(loss, plain)
        got, expected = (torch.autograd.grad(value.sum(), pixels) for value in (loss, plain))
        torch.testing.assert_close(got, expected)
