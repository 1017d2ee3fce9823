"""Calls of differentiable operators that bypass autograd if it has nothing to record."""

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

    PyTorch runs the Python code of a registered backward at every call, even if no gradient is recorded. That takes 50
    to 150 us, longer than most of the operators' kernels. A call that is not recorded goes to the kernel directly.
    """
    if recorded or torch.compiler.is_compiling():
        return operator(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)
