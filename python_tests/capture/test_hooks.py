"""Captured factors against autograd's own weight gradients."""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from cases import CONV, LINEAR, samples, target_of, tiny_base
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from r2f_ext.capture import Capture
from r2f_ext.capture.hooks import FUSED_TOKENS, fused_attention
from r2f_ext.errors import R2FError
from r2f_ext.models import load_base
from r2f_ext.types import BaseModel

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


class _Products(TorchDispatchMode):
    """Counts products of matrices and convolutions as they are computed."""

    KINDS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.KINDS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def nodes_of(loss):
    """How often each kind of autograd node is in the graph of `loss`."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [n for n, _ in node.next_functions]
    return Counter(node.name() for node in seen)


def capture_with_graph(monkeypatch, base, names, images, labels):
    """What a capture found, the autograd nodes of its loss, and the products of its forward and backward."""
    graphs, forward, backward = [], _Products(), _Products()
    take_gradients = torch.autograd.grad

    def recorded(loss, *args, **options):
        forward.__exit__(None, None, None)
        graphs.append(nodes_of(loss))
        with backward:
            grads = take_gradients(loss, *args, **options)
        forward.__enter__()
        return grads

    monkeypatch.setattr(torch.autograd, "grad", recorded)
    with Capture(target_of(base, names)) as capture, forward:
        found = capture(images[:, None], labels[:, None])
    monkeypatch.undo()
    return found, graphs[0], forward.counts, backward.counts


# Of the 8 linear layers (2 blocks of qkv, proj, fc1, fc2; head is the ninth) and 2 x 2 products of attention, each
# layer above the first adapted one costs one product to its input's gradient, each product of attention two.
@pytest.mark.parametrize(
    ("names", "linear", "attention"),
    [
        (NAMES, 9, 8),
        (NAMES[1:], 8, 8),
        (("blocks.1.attn.qkv",), 4, 4),
        (("blocks.1.mlp.fc2",), 1, 0),
        (("head",), 0, 0),
    ],
    ids=["convolution", "first qkv", "second qkv", "last fc2", "head"],
)
def test_nothing_is_computed_for_weights_or_below_the_first_adapted_layer(monkeypatch, names, linear, attention):
    base = tiny_base()
    images, labels = samples(3, base)
    with _Products() as plain, torch.no_grad():
        base.model(base.normalize(images))
    _, graph, forward, backward = capture_with_graph(monkeypatch, base, names, images, labels)
    assert forward == plain.counts  # the model's own, once
    assert backward == Counter({k: n for k, n in (("mm", linear), ("bmm", attention)) if n})
    assert graph["torch::autograd::AccumulateGrad"] <= 1  # the first adapted layer's output; no parameter
    assert not any(p.grad is not None for p in base.model.parameters())


def test_the_graph_is_the_models_own(monkeypatch):
    base = tiny_base()
    images, labels = samples(3, base)
    inputs = base.normalize(images).requires_grad_()
    whole = nodes_of(F.cross_entropy(base.model(inputs), labels, reduction="sum") / 1)
    _, graph, _, _ = capture_with_graph(monkeypatch, base, NAMES, images, labels)
    below = whole - graph
    assert not graph - whole  # no node is added
    assert below == Counter({"ConvolutionBackward0": 1})  # the adapted convolution itself, the first layer
    _, graph, _, _ = capture_with_graph(monkeypatch, base, ("blocks.1.mlp.fc2",), images, labels)
    assert not graph - whole and sum(graph.values()) < sum(whole.values()) / 4


def test_inputs_are_kept_by_reference():
    base = tiny_base()
    images, labels = samples(2, base)
    kept = []
    handle = base.model.blocks[0].attn.qkv.register_forward_hook(lambda module, args, output: kept.append(args[0]))
    with handle, Capture(target_of(base, LINEAR)) as capture:
        found = capture(images[:, None], labels[:, None])
    assert found.x[LINEAR[0]].data_ptr() == kept[0].data_ptr()


def test_parameters_that_want_a_gradient_get_none():
    base = tiny_base()
    images, labels = samples(2, base)
    with Capture(target_of(base, LINEAR)) as capture:
        expected = capture(images[:, None], labels[:, None])
        base.model.requires_grad_(True)
        found = capture(images[:, None], labels[:, None])
    assert not any(p.grad is not None for p in base.model.parameters())
    for name in LINEAR:
        assert torch.equal(found.x[name], expected.x[name])
        torch.testing.assert_close(found.delta[name], expected.delta[name], rtol=1e-12, atol=1e-14)


class Aside(nn.Module):
    """A classifier with a layer whose output is not used, and one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.idle = nn.Linear(12, 5), nn.Linear(12, 3), nn.Linear(12, 3)

    def forward(self, x):
        x = x.flatten(1)
        self.unused(x)
        return self.used(x)


def test_layers_that_do_not_reach_the_logits():
    model = Aside().requires_grad_(False).eval()
    base = BaseModel(model, "aside", (3, 2, 2), (0.5,) * 3, (0.5,) * 3, 5)
    inputs = torch.rand(1, 2, 3, 2, 2), torch.tensor([[0, 3]])
    with Capture(target_of(base, ("used", "unused"))) as capture:
        found = capture(*inputs)
    assert found.dense("used").any() and not found.dense("unused").any()
    with Capture(target_of(base, ("used", "idle"))) as capture, pytest.raises(R2FError, match=r"idle .* does not run"):
        capture(*inputs)
    with Capture(target_of(base, ("unused",))) as capture, pytest.raises(R2FError, match="no adapted layer"):
        capture(*inputs)


def test_attention_is_fused_in_the_context_alone_and_on_a_gpu_for_few_tokens(device):
    base = tiny_base(torch.float32)
    base.model.to(device)
    attention, seen = base.model.blocks[0].attn, []
    images = samples(2, base, torch.float32)[0].to(device)
    with attention.register_forward_hook(lambda module, args, output: seen.append(module.fused_attn)):
        with fused_attention(base.model, True):
            attention(torch.zeros(1, FUSED_TOKENS + 1, 24, device=device))
            found = base.model(images)
        with fused_attention(base.model, False):
            plain = base.model(images)
        with pytest.raises(ValueError), fused_attention(base.model, True):
            base.model(images)
            raise ValueError
        base.model(images)
    assert seen == [device.type == "cpu", True, False, True, False] and not attention._forward_pre_hooks
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


def test_fused_attention_is_for_bfloat16_on_a_gpu_whose_factors_are_not_differentiated(device):
    base = load_base(device=device)
    target, seen = target_of(base, LINEAR), []
    images, labels = (each.to(device)[:, None] for each in samples(8, base, torch.float32))
    with base.model.blocks[0].attn.register_forward_hook(lambda module, *_: seen.append(module.fused_attn)):
        for dtype in (torch.float32, torch.bfloat16):
            for fused in (True, False):
                with Capture(target, dtype, fused=fused) as capture:
                    capture(images, labels)
                    capture(images, labels, create_graph=True)
    assert seen == [*4 * [False], device.type == "cuda", *3 * [False]]
