"""The update as a function of the images through several training steps: against PEFT, differences and known images."""

from math import prod

import pytest
import torch
from cases import peft_start, samples, target_of, tiny_base
from vit_cases import small_vit

from r2f_ext.errors import R2FError
from r2f_ext.inversion.exactness import REPRODUCED
from r2f_ext.inversion.gauss_newton import search
from r2f_ext.inversion.positions import FreePositions
from r2f_ext.inversion.task import GaussNewtonConfig
from r2f_ext.inversion.unrolled import UnrolledMap, movement_weights, side_by_side
from r2f_ext.inversion.update_map import BOX_PENALTY, Subspace, flat_units
from r2f_ext.models.timm_base import unfuse_attention
from r2f_ext.pairs import Training, simulate

RECIPES = {
    "two steps on two images": Training(steps=2, batch=2, lr=0.5),
    "momentum, decay, cosine": Training(steps=2, momentum=0.9, weight_decay=0.05, schedule="cosine"),
    "adamw, linear": Training(steps=2, optimizer="adamw", lr=0.01, weight_decay=0.1, schedule="linear"),
}


@pytest.fixture(scope="module")
def adapted():
    """target and A; tests of one recipe share its traced graphs (conftest.py)."""
    return peft_start(tiny_base(), target_modules=["patch_embed.proj", "blocks.1.attn.qkv"])


@pytest.mark.parametrize("training", RECIPES.values(), ids=RECIPES.keys())
def test_derivatives_of_victims_that_equal_peft(training, adapted):
    """`simulate` equals PEFT (python_tests/pairs/test_simulation.py); the derivatives equal central differences."""
    target, a = adapted
    base = target.base
    said = dict.fromkeys(target.names[:1], 0.5)  # A of one layer is looked at as well
    updates = UnrolledMap(target, a, base.input_shape, training, directions=4).weighing(a_weights=said)
    images, labels = samples(training.owned, base)
    columns, step = torch.randn(4, images.numel(), dtype=torch.float64), 1e-6

    state, _ = updates.along(images, labels, columns.unflatten(1, images.shape))
    victim = simulate(target, a, images[None], labels[None], training)
    for name in target.names:
        torch.testing.assert_close(state["a"][name], victim.a[name][0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(state["b"][name], victim.b[name][0], rtol=1e-9, atol=1e-12)

    found = updates.jacobian(images.flatten(), labels, columns[:3].T)
    ahead, behind = (updates(images.flatten() + s * step * columns[:3], labels) for s in (1, -1))
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-4, atol=1e-5 * float(found.abs().max()))


@pytest.mark.parametrize("training", RECIPES.values(), ids=RECIPES.keys())
def test_slopes_of_the_misfits_are_the_jacobians_times_the_errors(training, adapted):
    """Reverse mode through all steps against forward mode, with weights on B and on A; outside of [0, 1] as well."""
    target, a = adapted
    base = target.base
    weights = {layer.name: torch.rand(layer.d_out, layer.rank, dtype=torch.float64) for layer in target.layers}
    plain = UnrolledMap(target, a, base.input_shape, training, directions=4)
    updates = plain.weighing(weights, dict.fromkeys(target.names[:1], 0.5))
    images, labels = samples(training.owned, base)
    points = torch.stack([images.flatten(), 1.2 * images.flatten() - 0.1])
    observed, columns = updates(points.flip(1), labels), torch.randn(4, points.shape[1], dtype=torch.float64)
    for _ in range(2):  # traced, and as it was traced
        misfits, slopes = updates.slopes(points, labels, observed)
        for place, point in enumerate(points):
            errors, outside = updates(point[None], labels)[0] - observed[place], point - point.clamp(0, 1)
            expected = updates.jacobian(point, labels, columns.T) @ errors + BOX_PENALTY * columns @ outside
            torch.testing.assert_close(columns @ slopes[place], expected)
            torch.testing.assert_close(
                misfits[place], (errors.square().sum() + BOX_PENALTY * outside.square().sum()) / 2
            )
    apart, _ = plain.slopes(points, labels, plain(points.flip(1), labels))  # the graphs are shared, the weights are not
    errors = (plain(points, labels) - plain(points.flip(1), labels)).square().sum(1) / 2
    torch.testing.assert_close(apart, errors + BOX_PENALTY / 2 * (points - points.clamp(0, 1)).square().sum(1))


def test_slopes_on_the_base_of_freed_images_are_the_jacobians_times_the_errors():
    """Through two steps; a further call takes the map that was made, with the weights of the one that calls."""
    base = small_vit(depth=1)
    unfuse_attention(base.model)
    target = target_of(base, ("blocks.0.attn.qkv",), rank=4)
    a0 = {one.name: torch.rand(one.rank, one.d_in, dtype=torch.float64) for one in target.layers}
    plain = UnrolledMap(target, a0, base.input_shape, Training(steps=2, lr=0.3), directions=64)
    positions = FreePositions.of(base, plain.shape, 0.2 * torch.eye(768, dtype=torch.float64))
    updates, labels = plain.weighing(a_weights=dict.fromkeys(a0, 0.5)).on(positions.base), torch.tensor([3])
    point = (positions.freed(torch.rand(1, 768).double()) + 0.05 * positions.basis.sum(1)).detach()
    observed = updates(point.flip(1), labels)
    _, slopes = updates.slopes(point, labels, observed)
    errors, outside = updates(point, labels)[0] - observed[0], point[0] - point[0].clamp(0, 1)
    expected = updates.jacobian(point[0], labels, torch.eye(point.shape[1]).double()) @ errors + BOX_PENALTY * outside
    torch.testing.assert_close(slopes[0], expected)
    same = plain.on(positions.base)
    assert same._step is updates._step and not same.a_weights


@pytest.fixture(scope="module")
def few_unknowns():
    """target, A, a subspace of 20 directions, and images in it."""
    base = tiny_base()
    target, a = peft_start(base, target_modules=["attn.qkv", "mlp.fc2"])
    smooth = torch.randn(20, 768, dtype=torch.float64) * 0.05
    proxies = (0.5 + torch.randn(100, 20, dtype=torch.float64) @ smooth / 20**0.5).clamp(0, 1)
    return target, a, Subspace.of(proxies.unflatten(1, base.input_shape)), proxies[:2]


def found_from_near(updates, observed, images, labels, subspace):
    subspace = side_by_side(subspace, len(images))
    noise = torch.randn(subspace.basis.shape[1], dtype=torch.float64)
    start = (images.flatten() + 0.2 * subspace.basis @ noise).clamp(0, 1)
    found = search(updates, observed, start, labels, subspace, GaussNewtonConfig(passes=8))
    assert (start - images.flatten()).abs().max() > 1e-2
    return found


@pytest.mark.parametrize(
    "training",
    [Training(batch=2, lr=0.3), Training(steps=2, samples=2, lr=0.3, momentum=0.9)],
    ids=["two images in one step", "two steps with momentum, each on its own image"],
)
def test_finds_the_images_of_a_victim(few_unknowns, training):
    target, a, subspace, images = few_unknowns
    images, labels = images[: training.owned], torch.tensor([1, 4])[: training.owned]
    shape = target.base.input_shape
    victim = simulate(target, a, images.view(1, -1, *shape), labels[None], training)
    said = movement_weights(a, {name: each[0] for name, each in victim.a.items()})
    assert len(said) == (0 if training.steps == 1 else len(a))
    updates = UnrolledMap(target, a, shape, training, directions=20).weighing(a_weights=said)
    found = found_from_near(updates, updates.observation(victim.a, victim.b)[0], images, labels, subspace)
    assert found.residual < REPRODUCED and (found.image - images.flatten()).abs().max() < 1e-4


def test_one_plain_step_is_the_update_map(few_unknowns):
    target, a, _, images = few_unknowns
    training, shape, label = Training(), target.base.input_shape, torch.tensor([3])
    victim = simulate(target, a, images[:1].view(1, 1, *shape), label[None], training)
    found = UnrolledMap(target, a, shape, training)(images[:1], label)
    torch.testing.assert_close(found, flat_units(victim.b))


def test_bad_input_is_refused(few_unknowns):
    target, a, *_ = few_unknowns
    shape = target.base.input_shape
    with pytest.raises(R2FError, match="dropout"):
        UnrolledMap(target, a, shape, Training(dropout=0.1))
    updates = UnrolledMap(target, a, shape, Training(steps=2)).weighing(a_weights=dict.fromkeys(a, 1.0))
    still = {name: each[None] for name, each in a.items()}
    b = {layer.name: torch.ones(1, layer.d_out, layer.rank, dtype=torch.float64) for layer in target.layers}
    with pytest.raises(R2FError, match="not moved"):
        updates.observation(still, b)


def test_a_trial_image_without_a_finite_update_is_not_a_damaged_adapter(few_unknowns):
    """A step of the search may fail; the adapter that was given has nothing to do with it."""
    target, a, *_ = few_unknowns
    shape = target.base.input_shape
    updates = UnrolledMap(target, a, shape, Training(steps=2))
    point = torch.full((1, prod(shape)), torch.nan, dtype=torch.float64)
    assert updates(point, torch.zeros(1, dtype=torch.int64)).isnan().any()
