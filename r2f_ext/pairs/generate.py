"""Pairs at one start: every pair is taken at the same parameters, so one batch makes many of them.

The seed's procedure (step, record, reset) gives B1 = -lr * s * G A^T, A1 = A from PEFT's start (B = 0).
The update kept here is the descent direction s * G A^T, which is -B1 / lr: decoders normalise it anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from r2f_ext.capture import Capture
from r2f_ext.data import ImageSet
from r2f_ext.errors import R2FError
from r2f_ext.files import sha256_of
from r2f_ext.ops import lora_grad
from r2f_ext.types import FactoredGradient, PairBatch, Target

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCH_GROUPS = 100  # groups of one forward and backward: large enough for full GEMM speed, small enough for cache


class PairSource(Protocol):
    """Pairs that can be walked through more than once, always in the same order."""

    target: Target
    a: dict[str, Tensor]

    def __len__(self) -> int:
        """Number of pairs."""
        ...

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[PairBatch]:
        """The pairs `start` to `stop`, in batches."""
        ...


def project(target: Target, gradient: FactoredGradient, a: dict[str, Tensor]) -> dict[str, Tensor]:
    """The update that each group's one step from B = 0 gives an adapter whose A is `a`: s G A^T [P, d_out, r].

    At B = 0 the factors (x, delta) do not depend on A: captured once, they serve every adapter of the base.
    """
    return {
        layer.name: lora_grad(
            gradient.x[layer.name],
            gradient.delta[layer.name],
            a[layer.name].to(gradient.x[layer.name].dtype),
            scale=layer.scale,
        ).grad_B
        for layer in target.layers
    }


class GeneratedPairs:
    """Pairs made from proxy images as they are walked through; nothing is kept.

    Args:
        target: base model and adapted layers.
        a: name -> the adapter's own A [r, d_in].
        proxy: images and labels; pair i uses samples i * group_size to (i + 1) * group_size - 1.
        group_size: samples of one victim step (batch size b).
        precision: "float32", or "bfloat16" to run the model under autocast (see `Capture`). Updates and factors are
            float32 either way; their cosine to the float32 ones is then about 0.9999.

    Raises:
        R2FError: the proxy has too few images for two pairs, or the precision is neither.
    """

    def __init__(
        self, target: Target, a: dict[str, Tensor], proxy: ImageSet, group_size: int = 1, precision: str = "float32"
    ) -> None:
        if len(proxy) < 2 * group_size:
            raise R2FError(
                f"proxy '{proxy.name}' has {len(proxy)} images: at least {2 * group_size} are needed, "
                "thousands for a good decoder."
            )
        if precision not in PRECISIONS:
            raise R2FError(f"unknown precision '{precision}': choose {' or '.join(PRECISIONS)}.")
        self.target, self.a, self.proxy, self.group_size, self.precision = target, a, proxy, group_size, precision

    def __len__(self) -> int:
        return len(self.proxy) // self.group_size

    @property
    def recipe(self) -> dict[str, Any]:
        """How the pairs are made: for manifests."""
        proxy = {"proxy": self.proxy.name, "proxy_sha256": sha256_of([self.proxy.images, self.proxy.labels])}
        return {**proxy, "group_size": self.group_size, "precision": self.precision}

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[PairBatch]:
        stop = len(self) if stop is None else min(stop, len(self))
        device = self.target.base.device
        with Capture(self.target, PRECISIONS[self.precision]) as capture:
            for first in range(start, stop, BATCH_GROUPS):
                groups = min(BATCH_GROUPS, stop - first)
                index = torch.arange(first * self.group_size, (first + groups) * self.group_size)
                images = self.proxy.batch(index).to(device).unflatten(0, (groups, self.group_size))
                labels = self.proxy.labels[index].to(device).unflatten(0, (groups, self.group_size))
                gradient = capture(images, labels)
                updates = project(self.target, gradient, self.a)
                if self.precision != "float32":
                    gradient = gradient.float32()
                yield PairBatch(updates, gradient, images, labels)
