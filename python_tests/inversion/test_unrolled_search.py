"""Searches through a known training, with what the adapter's factors leave unknown, and the bounds on their images."""

import torch
from cases import target_of
from vit_cases import small_vit

from r2f_ext.inversion import unrolled_search as module
from r2f_ext.inversion.gauss_newton import search
from r2f_ext.inversion.task import GaussNewtonConfig
from r2f_ext.inversion.unrolled_search import UnrolledSearch, seen_of
from r2f_ext.inversion.update_map import Subspace
from r2f_ext.models.timm_base import unfuse_attention
from r2f_ext.pairs import Training, simulate

CONFIG = GaussNewtonConfig(passes=8, directions=20)


def in_a_subspace(images=1):
    """target, A, a subspace of 20 directions, images in it with pixels at 0 and 1, and a start near them; float32."""
    torch.manual_seed(0)
    base = small_vit(depth=2)
    base.model.float()
    unfuse_attention(base.model)
    target = target_of(base, ("blocks.0.attn.qkv", "blocks.0.mlp.fc2", "blocks.1.attn.qkv"), rank=8)
    a = {one.name: torch.rand(one.rank, one.d_in) / one.d_in**0.5 for one in target.layers}
    smooth = torch.nn.functional.interpolate(torch.randn(20, 3, 5, 5), size=(16, 16), mode="bilinear").flatten(1)
    smooth[:, ::7] = 0  # pixels that no proxy varies stay at 0
    proxies = 0.5 + torch.randn(100, 20) @ smooth * 0.03
    proxies[:, ::7] = 0
    subspace = Subspace.of(proxies.clamp(0, 1).unflatten(1, base.input_shape))
    chosen = proxies[:images].clamp(0, 1)
    noise = torch.randn(images, subspace.basis.shape[1])
    return target, a, subspace, chosen, (chosen + 0.2 * noise @ subspace.basis.T).clamp(0, 1)


def error(image, original):
    return float((image - original.flatten()).square().mean().sqrt())


def test_finds_the_image_of_adamws_first_step_and_ends_at_its_noise():
    target, a, subspace, image, start = in_a_subspace()
    label, training = torch.tensor([2]), Training(optimizer="adamw", lr=1e-3)
    victim = simulate(target, a, image.view(1, 1, *target.base.input_shape), label[None], training)
    b = {name: each[0] for name, each in victim.b.items()}
    searches = UnrolledSearch(target, a, training, subspace, CONFIG)
    found = searches.find(a, b, start[0], label)
    seen = seen_of(searches.updates, a, b, training)
    assert found.noise == seen.noise > 1e-3 and 0.7 * found.noise < found.residual < 1.2 * found.noise
    left = (seen.updates(found.image[None], label)[0] - seen.values).norm() / len(target.layers) ** 0.5
    torch.testing.assert_close(left, torch.tensor(found.residual), rtol=1e-3, atol=0)
    first = search(seen.updates, seen.values, start[0], label, subspace, CONFIG, noise=seen.noise)
    errors = [error(each, image) for each in (found.image, first.image, start)]
    assert errors[0] < 0.3 * errors[1] < 0.1 * errors[2]  # the last stage helps
    bound = searches.bound(a, b, found.image, label)
    assert bound.free > 0 and bound.misfit < 3  # pixels vary in 768 directions, of which no search knows


def test_finds_two_images_of_one_step_of_adamw():
    target, a, subspace, images, start = in_a_subspace(images=2)
    labels, training = torch.tensor([2, 5]), Training(optimizer="adamw", lr=1e-3, batch=2)
    victim = simulate(target, a, images.view(1, 2, *target.base.input_shape), labels[None], training)
    b = {name: each[0] for name, each in victim.b.items()}
    searches = UnrolledSearch(target, a, training, subspace, CONFIG)
    assert searches.positions is None
    found = searches.find(a, b, start.flatten(), labels)
    assert error(found.image, images) < 0.1 * error(start.flatten(), images)


def test_where_no_gradient_is_read_both_stages_weigh_alike(monkeypatch):
    target, a, subspace, image, start = in_a_subspace()
    label, training = torch.tensor([2]), Training(steps=2, lr=0.1)
    victim = simulate(target, a, image.view(1, 1, *target.base.input_shape), label[None], training)
    factors = ({name: each[0] for name, each in group.items()} for group in (victim.a, victim.b))
    ended = []
    monkeypatch.setattr(module, "finished", lambda task, found, rough: ended.append((task.noise, rough)) or found)
    found = UnrolledSearch(target, a, training, subspace, CONFIG).find(*factors, start[0], label)
    assert ended == [(0.0, None)] and error(found.image, image) < 0.01 * error(start[0], image)
