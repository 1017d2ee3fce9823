"""When a call must be recorded for gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would follow an operator on these; if not, the raw operator is called, which costs less.

    Under transforms (`torch.func`, forward mode) tensors do not tell: there it is assumed.
    """
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    if torch.compiler.is_dynamo_compiling():
        return False
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0
