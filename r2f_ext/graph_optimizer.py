"""Optimises traced functions: removes redundant operations that the transforms of torch.func leave behind.

These are derivatives of constants, copies and common subexpressions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten

from r2f_ext import onednn

_aten = torch.ops.aten
_ZEROS = {_aten.zeros.default, _aten.zeros_like.default, _aten.new_zeros.default}
_ZERO_IF_FIRST_IS = {  # operators whose result is zero if their first argument is zero
    *(_aten.view.default, _aten._unsafe_view.default, _aten.expand.default, _aten.alias.default, _aten.detach.default),
    *(_aten.transpose.int, _aten.t.default, _aten.permute.default, _aten.unsqueeze.default, _aten.squeeze.dim),
    *(_aten.select.int, _aten.slice.Tensor, _aten.clone.default, _aten._to_copy.default, _aten.neg.default),
    *(_aten.sum.dim_IntList, _aten.mean.dim, _aten.mul.Scalar, _aten.div.Scalar, _aten.div.Tensor),
}
_PRODUCTS = {_aten.mul.Tensor, _aten.mm.default, _aten.bmm.default}
_SUMS = {_aten.add.Tensor, _aten.sub.Tensor}
_VIEWS = {_aten.view.default, _aten.expand.default, _aten.alias.default, _aten._to_copy.default}


class Traced:
    """A function of (nested) tensors, traced and simplified once for each combination of structure, shapes and dtypes.

    Without this, the interpreter of torch.func's transforms costs more than the arithmetic of small tensors.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._graphs: dict[tuple[object, ...], fx.GraphModule] = {}

    @torch.no_grad()
    def __call__(self, *inputs: Any) -> Any:
        leaves, structure = tree_flatten(inputs)
        key = (structure, *((each.shape, each.dtype) for each in leaves))
        if key not in self._graphs:
            # make_fx takes a plain function, not a method.
            plain: Any = functionalize(lambda *inputs: self._function(*inputs))
            # With a tracing context `make_fx` describes all results by one fake mode. It otherwise makes a mode, with
            # a whole stack trace, for each of thousands of operators: 40 % of its time.
            one_mode = tracing(TracingContext(FakeTensorMode()))
            with torch.enable_grad(), _without_torchs_own_deprecation(), one_mode:
                self._graphs[key] = onednn.rewritten(simplify(make_fx(plain)(*inputs)))
        return self._graphs[key](*inputs)


@contextmanager
def _without_torchs_own_deprecation() -> Iterator[None]:
    """Ignore a warning about a call that torch itself makes: when forward mode is first used, torch compiles
    decompositions with `torch.jit.script`, which is deprecated. No caller can change that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is", FutureWarning)
        yield


def simplify(graph: fx.GraphModule) -> fx.GraphModule:
    """Simplify, in place, a graph that `make_fx` traced from a functionalized function.

    Removes sums with zeros and products with zeros (0 times anything counts as 0), copies and views that change
    nothing, and operators that were already applied to the same arguments. A graph with operators that write into
    their arguments or draw random numbers stays as it is.
    """
    nodes = list(graph.graph.nodes)
    if any(_has_effects(node) for node in nodes):
        return graph
    zeros: set[fx.Node] = set()
    seen: dict[str, fx.Node] = {}
    for node in nodes:
        if node.op not in ("get_attr", "call_function"):
            continue
        key = f"{node.target} {node.args} {node.kwargs}"
        same = seen.get(key) or _equal_argument(node, zeros)
        seen[key] = same or node
        if same is not None:
            node.replace_all_uses_with(same)
            graph.graph.erase_node(node)
        elif _is_zero(node, zeros):
            zeros.add(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _has_effects(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags


def _is_zero(node: fx.Node, zeros: set[fx.Node]) -> bool:
    if node.target in _ZEROS:
        return True
    inputs = node.all_input_nodes
    if node.target in _ZERO_IF_FIRST_IS:
        return node.args[0] in zeros
    if node.target in _PRODUCTS:
        return any(each in zeros for each in inputs)
    return node.target in _SUMS and len(node.args) == 2 and all(each in zeros for each in node.args)


def _equal_argument(node: fx.Node, zeros: set[fx.Node]) -> fx.Node | None:
    """The argument that the node's result equals in shape, strides, dtype and all values, where there is one."""
    first = node.args[0] if node.args else None
    if node.target in _SUMS and len(node.args) == 2 and not node.kwargs:
        left, right = node.args
        if right not in zeros and (left not in zeros or node.target is not _aten.add.Tensor):
            return None
        first = left if right in zeros else right
    elif node.target not in _VIEWS:
        return None
    return first if isinstance(first, fx.Node) and _form(first) == _form(node) is not None else None


def _form(node: fx.Node) -> tuple[object, ...] | None:
    meta = node.meta.get("tensor_meta")
    return None if meta is None else (meta.shape, meta.stride, meta.dtype)
