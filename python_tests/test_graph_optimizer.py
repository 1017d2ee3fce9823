import warnings

import torch
from torch.func import functionalize, jvp
from torch.fx.experimental.proxy_tensor import make_fx

from r2f_ext.graph_optimizer import Traced, simplify

WEIGHT = torch.randn(4, 3, dtype=torch.float64)


def doubled(x):
    return 2 * x


def operators(graph):
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


def simplified(function, *inputs):
    graph = make_fx(functionalize(function))(*inputs)
    before = len(operators(graph))
    return simplify(graph), before


def test_forward_mode_loses_the_derivative_of_constants_and_keeps_its_values():
    def function(x, v):
        return jvp(lambda x: torch.tanh(x @ WEIGHT) * x.sum(), (x,), (v,))

    x, v = torch.randn(2, 5, 4, dtype=torch.float64)
    graph, before = simplified(function, x, v)
    torch.testing.assert_close(graph(x, v), function(x, v))
    torch.testing.assert_close(graph(v, x), function(v, x))
    found = operators(graph)
    assert len(found) < before and "aten._to_copy.default" not in found


def test_sums_with_zeros_are_left_out_where_nothing_else_changes():
    def function(x):
        kept = x - torch.zeros_like(x) + torch.zeros(3) * 2
        return kept, torch.zeros_like(x) - x, x[:1] + torch.zeros(2, 3), x + torch.zeros(2, 3, dtype=torch.float64)

    x = torch.randn(2, 3)
    graph, _ = simplified(function, x)
    for found, expected in zip(graph(x), function(x), strict=True):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    found = operators(graph)
    # What turns the sign, the shape or the dtype stays.
    assert found.count("aten.sub.Tensor") == 1 and found.count("aten.add.Tensor") == 2


def test_what_is_done_twice_is_done_once():
    def function(x):
        return torch.exp(x.view(6)).sum() + torch.exp(x.view(6)).max()

    x = torch.randn(2, 3)
    graph, before = simplified(function, x)
    assert torch.equal(graph(x), function(x))
    assert operators(graph).count("aten.exp.default") == 1 and before == len(operators(graph)) + 2


def test_graphs_that_write_or_draw_stay_as_they_are():
    for function in (lambda x: x.clone().add_(0 * x) + x.clone(), lambda x: torch.rand_like(x) + torch.rand_like(x)):
        graph = make_fx(function)(torch.randn(3))
        before = operators(graph)
        assert operators(simplify(graph)) == before


def test_only_the_deprecation_of_torchs_own_scripts_is_left_unsaid():
    """As torch.autograd.forward_ad does when it is first used; each process does so once."""

    def scripted(x):
        torch.jit.script(doubled)
        warnings.warn("of the function itself", FutureWarning, stacklevel=1)
        return doubled(x)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        Traced(scripted)(torch.ones(3))
    assert [str(each.message) for each in said] == ["of the function itself"]
