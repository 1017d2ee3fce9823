"""Products by oneDNN against PyTorch's own, on every processor that has the operator."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from r2f_ext import onednn

pytestmark = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="a torch without oneDNN")


@pytest.fixture(autouse=True)
def faster(monkeypatch):
    """As on a processor on which oneDNN is faster, also for rather small products."""
    monkeypatch.setattr(onednn, "wins", lambda: True)
    monkeypatch.setattr(onednn, "LEAST", 1 << 20)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(700, 64), (5, 140, 64)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_all_first_derivatives_are_those_of_a_linear_layer(shape, with_bias):
    x, weight, bias = torch.randn(shape), torch.randn(40, 64), torch.randn(40) if with_bias else None
    inputs = [each.requires_grad_() for each in (x, weight, bias) if each is not None]
    found, expected = onednn.linear(x, weight, bias), F.linear(x, weight, bias)
    assert type(found.grad_fn).__name__ == "_LinearBackward"
    close(found, expected)
    seed = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(found, inputs, seed), torch.autograd.grad(expected, inputs, seed), strict=True
    ):
        close(one, other)


def test_second_derivatives_are_those_of_a_linear_layer():
    """Of a matching loss: the slope at the input of a norm of the gradient at the input of a layer below."""
    x, first, second = torch.randn(800, 64), torch.randn(90, 64), torch.randn(20, 90)

    def slope(linear):
        images = x.clone().requires_grad_()
        hidden = F.gelu(linear(images, first))
        (delta,) = torch.autograd.grad(linear(hidden, second).square().sum(), hidden, create_graph=True)
        return torch.autograd.grad(delta.square().mean(), images)[0]

    close(slope(onednn.linear), slope(F.linear))


def test_strides_that_are_slow_for_onednn_are_copied_first(monkeypatch):
    given, call = [], torch.ops.mkldnn._linear_pointwise.default

    def recorded(x, weight, *others):
        given.append((x.is_contiguous(), weight.is_contiguous() or weight.mT.is_contiguous()))
        return call(x, weight, *others)

    monkeypatch.setattr(torch.ops.mkldnn._linear_pointwise, "default", recorded)
    x, weight = torch.randn(800, 128), torch.randn(80, 128)
    for left, right in ((x[:, ::2], weight[:, ::2]), (x[:1].expand(800, 128), weight), (x[:, :80], weight[:, :80].mT)):
        close(onednn.linear(left, right), F.linear(left, right))
    assert given == [(True, True)] * 3


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.randn(63, 8), torch.randn(40, 8)),
        (torch.randn(7, 1000), torch.randn(1000, 1000)),
        (torch.randn(800, 64).double(), torch.randn(40, 64).double()),
        (torch.randn(800, 2000), torch.randn(2000)),
        (torch.randn(2000), torch.randn(2000, 2000)),
    ],
    ids=["small", "narrow", "float64", "a vector", "a row"],
)
def test_what_it_is_not_for_is_left_to_pytorch(x, weight):
    assert torch.equal(onednn.linear(x, weight), F.linear(x, weight))
    assert onednn.linear(x.requires_grad_(), weight).grad_fn.name() != "_LinearBackward"


def test_layers_of_a_model_use_it_inside_the_context_only():
    model, x = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32)), torch.randn(800, 64)
    with onednn.linear_layers():
        inside = model(x)
    with onednn.linear_layers(False):
        unwanted = model(x)
    close(inside, unwanted)
    names = [type(each.grad_fn).__name__ for each in (inside, unwanted, model(x))]
    assert names == ["_LinearBackward", "AddmmBackward0", "AddmmBackward0"]


def test_products_of_a_graph_are_replaced_where_they_are_large():
    def function(x, weight):
        return x @ weight, x[:9] @ weight, (x.double() @ weight.double()).float()

    x, weight = torch.randn(800, 64), torch.randn(64, 40)
    graph = onednn.rewritten(make_fx(functionalize(function))(x, weight))
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(onednn._matmul) == 1 and targets.count(torch.ops.aten.mm.default) == 2
    for found, expected in zip(graph(x, weight), function(x, weight), strict=True):
        close(found, expected)


def test_products_of_other_devices_stay_in_a_graph():
    """A GPU's graph beside a processor on which oneDNN is faster."""
    x, weight = torch.randn(800, 64, device="meta"), torch.randn(64, 40, device="meta")
    graph = onednn.rewritten(make_fx(lambda x, weight: x @ weight)(x, weight))
    assert [node.target for node in graph.graph.nodes].count(torch.ops.aten.mm.default) == 1


def test_names_of_arguments_odd_biases_and_autocast_are_those_of_a_linear_layer():
    x, weight = torch.randn(800, 64), torch.randn(40, 64)
    with onednn.linear_layers():
        close(F.linear(input=x, weight=weight, bias=None), x @ weight.T)
        for bias in (torch.randn(1), torch.randn(1, 40), torch.randn(800, 40)):
            close(F.linear(x, weight, bias), x @ weight.T + bias)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            F.linear(x[:, 1:], weight)
        with torch.autocast("cpu", torch.bfloat16):
            assert F.linear(x, weight).dtype == torch.bfloat16


def test_a_weight_may_change_before_a_backward_that_does_not_need_it():
    x, weight = torch.randn(800, 64), torch.randn(40, 64, requires_grad=True)
    loss = onednn.linear(x, weight).sum()
    with torch.no_grad():
        weight.add_(1)
    (found,) = torch.autograd.grad(loss, weight)
    close(found, x.sum(0).expand(40, -1))


def test_it_is_chosen_by_the_processor_alone(monkeypatch):
    monkeypatch.undo()
    chosen = {}
    for capability in ("AVX512", "AVX2"):
        for maker in ("AuthenticAMD", "GenuineIntel"):
            monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
            monkeypatch.setattr(onednn.Path, "read_text", lambda self, maker=maker: f"vendor_id : {maker}\n")
            chosen[capability, maker] = onednn.wins.__wrapped__()
    assert [key for key, yes in chosen.items() if yes] == [("AVX512", "AuthenticAMD")]
