"""float32 products by oneDNN on processors for which MKL, PyTorch's default, has no code of full width.

MKL chooses its code by the maker of the processor. On AMD's processors with AVX-512 it reaches less than half the rate
of oneDNN, which is part of PyTorch as well (benchmarks/onednn.py). PyTorch itself uses oneDNN for float32 only in
convolutions, and in the operator of compiled models that is called here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

# Multiplications of a product, and the smallest of its three sizes: below either, oneDNN's preparations and autograd's
# calls in Python cost more than is gained.
LEAST, NARROWEST = 1 << 23, 8
_aten = torch.ops.aten


@cache
def wins() -> bool:
    """Whether oneDNN multiplies float32 matrices faster than MKL here: with AVX-512, on a processor not by Intel."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, input [..., k] @ weight.T [k, n] + bias [n], by oneDNN where it is faster.

    By oneDNN it has derivatives of every order in reverse mode, but none for torch.func, in forward mode or for batches
    of gradients.
    """
    if not _takes(input, weight, bias):
        return F.linear(input, weight, bias)
    found: Tensor = _Linear.apply(input, weight, bias)
    return found


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    given = (x, weight) if bias is None else (x, weight, bias)
    return (
        wins()
        and all(each.device.type == "cpu" and each.dtype == torch.float32 for each in given)
        and not torch.is_autocast_enabled("cpu")
        and x.ndim >= 2
        and weight.ndim == 2
        and x.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and _large(x.shape[:-1].numel(), *weight.shape)
    )


def _large(*sizes: int) -> bool:
    return prod(sizes) >= LEAST and min(sizes) >= NARROWEST


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not (weight.is_contiguous() or weight.mT.is_contiguous()):
        weight = weight.contiguous()  # for other strides oneDNN takes a thousand times as long
    found: Tensor = torch.ops.mkldnn._linear_pointwise.default(x.contiguous(), weight, bias, "none", [], "")
    return found


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    return _product(left, right.mT)


class _Linear(torch.autograd.Function):
    """x @ weight.T + bias; its derivatives are products of the same kind."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        to_x, to_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if to_weight else None, weight if to_x else None)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, (to_x, to_weight, to_bias) = grad.flatten(0, -2), ctx.needs_input_grad
        return (
            linear(grad, weight.mT) if to_x else None,
            linear(rows.mT, x.flatten(0, -2).mT) if to_weight else None,
            rows.sum(0) if to_bias else None,
        )


class _Mode(TorchFunctionMode):
    """`F.linear` is `linear`."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return (linear if func is F.linear else func)(*args, **(kwargs or {}))


@contextmanager
def linear_layers(wanted: bool = True) -> Iterator[None]:
    """In this context calls of `F.linear`, as the linear layers of a model make them, are `linear`, if `wanted`."""
    if not wanted or not wins():
        yield
        return
    with _Mode():
        yield


def rewritten(graph: fx.GraphModule) -> fx.GraphModule:
    """The traced graph, changed in place: its products of matrices are oneDNN's where these are faster."""
    if not wins():
        return graph
    for node in graph.graph.find_nodes(op="call_function", target=_aten.mm.default):
        found, left = node.meta.get("val"), node.args[0].meta.get("val")
        if found is None or left is None or found.device.type != "cpu" or found.dtype != torch.float32:
            continue
        if _large(*left.shape, found.shape[1]):
            node.target = _matmul
    graph.recompile()
    return graph
