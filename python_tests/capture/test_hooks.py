"""Captured factors against autograd's own weight gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import CONV, LINEAR, samples, target_of, tiny_base

from r2f_ext.capture import Capture
from r2f_ext.errors import R2FError

NAMES = (CONV, "blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2", "head")


def autograd_gradients(base, names, images, labels, create_graph=False):
    """name -> dL/dW [d_out, d_in] of the mean cross-entropy, by backward through the plain model."""
    model = copy.deepcopy(base.model).requires_grad_(True)
    weights = [model.get_submodule(name).weight for name in names]
    loss = F.cross_entropy(model(base.normalize(images)), labels)
    grads = torch.autograd.grad(loss, weights, create_graph=create_graph)
    return {name: grad.flatten(1) for name, grad in zip(names, grads, strict=True)}


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("names", [NAMES, NAMES[3:], NAMES[:1]], ids=["all", "upper", "convolution"])
def test_every_group_equals_autograd(size, names):
    base = tiny_base()
    images, labels = samples(4 * size, base)
    with Capture(target_of(base, names)) as capture:
        found = capture(images.unflatten(0, (4, size)), labels.unflatten(0, (4, size)))
    for group in range(4):
        rows = slice(group * size, (group + 1) * size)
        expected = autograd_gradients(base, names, images[rows], labels[rows])
        for name in names:
            torch.testing.assert_close(found.dense(name)[group], expected[name], rtol=1e-9, atol=1e-13)
            assert found.x[name].shape[1] == size * (1 if name == "head" else 16 if name == CONV else 17)


def test_factors_differentiate_to_the_pixels():
    base = tiny_base()
    images, labels = samples(2, base)
    images.requires_grad_()
    wanted = {name: torch.randn_like(g) for name, g in autograd_gradients(base, NAMES, images, labels).items()}
    with Capture(target_of(base, NAMES)) as capture:
        found = capture(images[None], labels[None], create_graph=True)
    (mine,) = torch.autograd.grad(sum((found.dense(n)[0] * w).sum() for n, w in wanted.items()), images)
    expected = autograd_gradients(base, NAMES, images, labels, create_graph=True)
    (theirs,) = torch.autograd.grad(sum((expected[n] * w).sum() for n, w in wanted.items()), images)
    assert theirs.abs().max() > 1e-8
    torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-12)


def test_it_works_inside_no_grad_and_keeps_no_graph_unless_asked():
    base = tiny_base()
    images, labels = samples(1, base)
    with torch.no_grad(), Capture(target_of(base, LINEAR)) as capture:
        found = capture(images[None], labels[None])
    assert not any(t.requires_grad for t in (*found.x.values(), *found.delta.values()))


def test_the_hooks_go_away_even_after_an_error():
    base = tiny_base()
    images, labels = samples(1, base)
    with pytest.raises(RuntimeError), Capture(target_of(base, LINEAR)) as capture:
        capture(images[None, :, :2], labels[None])
    assert not any(module._forward_hooks for module in base.model.modules())
    assert not base.model(base.normalize(images)).requires_grad


def test_a_layer_that_the_base_lacks_is_named():
    base = tiny_base()
    target = target_of(base, LINEAR)
    base.model.blocks = base.model.blocks[:1]
    with pytest.raises(R2FError, match=r"no layer blocks\.1\.mlp\.fc2"):
        Capture(target)
