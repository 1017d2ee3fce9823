"""Calls of differentiable operators that leave autograd out where it has nothing to record."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def wants_graph(*lists: Iterable[Tensor]) -> bool:
    """Whether autograd records a call on these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensors in lists for tensor in tensors)


def call(operator: Any, recorded: bool, *arguments: Any) -> Any:
    """The operator's result.

    PyTorch runs a registered backward's Python code at every call, also where no gradient is recorded: 50 to 150 us,
    which is longer than most kernels of an operator take. A call that is not recorded goes to the kernel directly.
    """
    if recorded or torch.compiler.is_compiling():
        return operator(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)
