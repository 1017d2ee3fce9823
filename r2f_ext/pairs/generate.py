"""Pairs at one start: every pair is taken at the same parameters, so one batch makes many of them.

The seed's procedure (step, record, reset) gives B1 = -lr * s * G A^T, A1 = A from PEFT's start (B = 0).
The update kept here is the descent direction s * G A^T, which is -B1 / lr: decoders normalise it anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from r2f_ext.capture import Capture
from r2f_ext.data import ProxyImages
from r2f_ext.errors import R2FError
from r2f_ext.ops import lora_grad
from r2f_ext.pairs.memory import SampleBytes, budget, sample_bytes
from r2f_ext.pairs.starts import random_a
from r2f_ext.types import FactoredGradient, PairBatch, Target

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCH_GROUPS = 100  # groups of one pass at most: large enough for full GEMM speed, small enough for cache


class PairSource(Protocol):
    """Pairs that can be walked through more than once, always in the same order.

    Batches hold gradients of the target's layers, and updates of these at least (a source that serves some layers of an
    adapter still gives the updates of all: one sample shaped them all).
    """

    target: Target
    a: dict[str, Tensor]

    @property
    def one_step(self) -> bool:
        """Whether the victims took one step of SGD from B = 0, so that their gradients do not depend on A."""
        ...

    @property
    def per_victim_a(self) -> bool:
        """Whether each victim started from an A of its own."""
        ...

    @property
    def group_size(self) -> int:
        """Samples of a victim."""
        ...

    def __len__(self) -> int:
        """Number of pairs."""
        ...

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[PairBatch]:
        """The pairs `start` to `stop`, in batches."""
        ...


def project(target: Target, gradient: FactoredGradient, a: dict[str, Tensor]) -> dict[str, Tensor]:
    """The update that each group's one step from B = 0 gives an adapter whose A is `a`: s G A^T [P, d_out, r].

    a: name -> [r, d_in] for all groups, or [P, r, d_in].

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
        own_a: a seed, to let every victim draw an A of its own (see `random_a`) instead of `a`.

    Raises:
        R2FError: the proxy has too few images for two pairs, or the precision is neither.
    """

    def __init__(
        self,
        target: Target,
        a: dict[str, Tensor],
        proxy: ProxyImages,
        group_size: int = 1,
        precision: str = "float32",
        own_a: int | None = None,
    ) -> None:
        need_images(proxy, group_size)
        if precision not in PRECISIONS:
            raise R2FError(f"unknown precision '{precision}': choose {' or '.join(PRECISIONS)}.")
        self.target, self.a, self.proxy, self.group_size, self.precision = target, a, proxy, group_size, precision
        self.own_a = own_a
        self.one_step, self.per_victim_a = True, own_a is not None

    def __len__(self) -> int:
        return len(self.proxy) // self.group_size

    @property
    def recipe(self) -> dict[str, Any]:
        """How the pairs are made: for manifests."""
        return {**recipe_of(self.proxy, self.group_size, self.own_a), "precision": self.precision}

    @cached_property
    def _sample(self) -> SampleBytes:
        return sample_bytes(self.target)

    @property
    def at_once(self) -> int:
        """Pairs of one pass, and so of a batch."""
        samples = budget(self.target.base.device) // self._sample.in_pass
        return max(1, min(BATCH_GROUPS, samples // self.group_size))

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[PairBatch]:
        stop, at_once = len(self) if stop is None else min(stop, len(self)), self.at_once
        with Capture(self.target, PRECISIONS[self.precision]) as capture:
            for first in range(start, stop, at_once):
                groups = min(at_once, stop - first)
                images, labels = samples_of(self.proxy, first, groups, self.group_size, self.target.base.device)
                gradient = capture(images, labels)
                a0 = None if self.own_a is None else random_a(self.target, self.own_a, first, groups)
                updates = project(self.target, gradient, self.a if a0 is None else a0)
                if self.precision != "float32":
                    gradient = gradient.float32()
                yield PairBatch(updates, gradient, images, labels, a0)


def need_images(proxy: ProxyImages, group_size: int) -> None:
    """Raise R2FError when the proxy has too few images for two victims."""
    if len(proxy) < 2 * group_size:
        raise R2FError(
            f"proxy '{proxy.name}' has {len(proxy)} images: at least {2 * group_size} are needed, "
            "thousands for a good decoder."
        )


def recipe_of(proxy: ProxyImages, group_size: int, own_a: int | None) -> dict[str, Any]:
    """What all kinds of pairs say of their making."""
    made = {"proxy": proxy.name, "proxy_sha256": proxy.fingerprint, "group_size": group_size}
    return made if own_a is None else {**made, "own_a": own_a}


def samples_of(proxy: ProxyImages, first: int, groups: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images [groups, size, c, h, w] and labels [groups, size] of the victims from `first` on."""
    index = torch.arange(first * size, (first + groups) * size)
    images = proxy.batch(index).to(device).unflatten(0, (groups, size))
    return images, proxy.labels[index].to(device).unflatten(0, (groups, size))
