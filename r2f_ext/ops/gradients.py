"""When a call must be recorded for gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would follow an operator on these; if not, the raw operator is called, which costs less."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
