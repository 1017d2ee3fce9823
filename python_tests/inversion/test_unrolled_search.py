"""Searches through a known training, with what the adapter's factors leave unknown, and the bounds on their images."""

import torch
from cases import peft_start, tiny_base

from r2f_ext.inversion.task import GaussNewtonConfig
from r2f_ext.inversion.unrolled_search import UnrolledSearch, seen_of
from r2f_ext.inversion.update_map import Subspace
from r2f_ext.pairs import Training, simulate


def in_a_subspace():
    """target, A, a subspace of 20 directions, and an image in it."""
    base = tiny_base()
    target, a = peft_start(base, target_modules=["attn.qkv", "mlp.fc2"])
    smooth = torch.randn(20, 768, dtype=torch.float64) * 0.05
    proxies = (0.5 + torch.randn(100, 20, dtype=torch.float64) @ smooth / 20**0.5).clamp(0.01, 0.99)
    return target, a, Subspace.of(proxies.unflatten(1, base.input_shape)), proxies[:1]


def test_finds_the_image_of_adamws_first_step_and_ends_at_its_noise():
    """The victim trains in float64 and B is stored in float32: AdamW's own arithmetic is precise, its file is not."""
    target, a, subspace, image = in_a_subspace()
    label, training = torch.tensor([2]), Training(optimizer="adamw", lr=1e-3)
    victim = simulate(target, a, image.view(1, 1, *target.base.input_shape), label[None], training)
    b = {name: each[0].float() for name, each in victim.b.items()}
    searches = UnrolledSearch(target, a, training, subspace, GaussNewtonConfig(passes=12, directions=20))
    noise = torch.randn(subspace.basis.shape[1], dtype=torch.float64)
    start = (image[0] + 0.2 * subspace.basis @ noise).clamp(0, 1)
    found = searches.find(a, b, start, label)
    fine = seen_of(searches.precise, a, b, training, 1e-6)
    assert found.residual < 1.2 * found.noise and found.noise == fine.noise and found.improved
    error, before = ((each - image[0]).square().mean().sqrt() for each in (found.image, start))
    assert error < 0.1 * before
    bound = searches.bound(a, b, found.image, label)
    assert bound.free > 0  # patches of 48 numbers are embedded in 24: pixels are not determined
