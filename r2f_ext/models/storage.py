"""The precision that numbers were stored in, judged by their values: files and loaders widen dtypes silently."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

STORED = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def storage_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The lowest-precision float dtype that holds every entry of all the tensors exactly.

    A bfloat16 adapter that was saved again as float32 is still bfloat16 by its values, and so is the A of an adapter
    that PEFT drew on a bfloat16 base and then trained in float32.
    """
    tensors = list(tensors)
    exact = (dtype for dtype in STORED if all(torch.equal(t.to(dtype).to(t.dtype), t) for t in tensors))
    return next(exact, torch.float64)
