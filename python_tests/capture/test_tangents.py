"""Tangents of captured factors against central differences in float64."""

import pytest
import torch
from cases import CONV, samples, target_of, tiny_base

from r2f_ext.capture import Capture
from r2f_ext.capture.tangents import CaptureTangents

NAMES = (CONV, "blocks.0.attn.qkv", "blocks.1.mlp.fc2", "head")


@pytest.mark.parametrize("size", [1, 2])
def test_equal_central_differences_and_the_plain_capture(size):
    base = tiny_base()
    target = target_of(base, NAMES)
    images, labels = samples(size, base)
    directions = torch.randn(3, size, *base.input_shape, dtype=torch.float64)
    gradient, moved = CaptureTangents(target)(images, labels, directions)
    with Capture(target) as capture:
        plain = capture(images[None], labels[None])
        step = 1e-5
        ahead = capture(images + step * directions, labels.expand(3, size))
        behind = capture(images - step * directions, labels.expand(3, size))
    for name in NAMES:
        torch.testing.assert_close(gradient.x[name], plain.x[name])
        torch.testing.assert_close(gradient.delta[name], plain.delta[name])
        for found, plus, minus in ((moved.x, ahead.x, behind.x), (moved.delta, ahead.delta, behind.delta)):
            expected = (plus[name] - minus[name]) / (2 * step)
            torch.testing.assert_close(found[name][:, 0], expected, rtol=1e-6, atol=1e-8)


def test_what_was_traced_serves_other_images_and_labels():
    base = tiny_base()
    target = target_of(base, NAMES)
    tangents = CaptureTangents(target)
    directions = torch.randn(2, 1, *base.input_shape, dtype=torch.float64)
    images, _ = samples(2, base)
    tangents(images[:1], torch.tensor([0]), directions)
    again = tangents(images[1:], torch.tensor([3]), directions)
    fresh = CaptureTangents(target)(images[1:], torch.tensor([3]), directions)
    for found, expected in zip(again, fresh, strict=True):
        for name in NAMES:
            torch.testing.assert_close(found.x[name], expected.x[name])
            torch.testing.assert_close(found.delta[name], expected.delta[name])


def test_leaves_no_hook_behind():
    base = tiny_base()
    images, labels = samples(1, base)
    CaptureTangents(target_of(base, NAMES))(images, labels, images[None])
    assert not any(module._forward_hooks for module in base.model.modules())
