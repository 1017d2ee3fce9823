"""Pairs at one start: every pair is taken at the same parameters, so one batch makes many of them.

One step of SGD from PEFT's start (B = 0) gives B1 = -lr * s * G A^T and leaves A as it is. The update of a pair is the
gradient with respect to B, s * G A^T = -B1 / lr: decoders normalise it anyway.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from r2f_ext.capture import Capture
from r2f_ext.capture.project import project
from r2f_ext.data import ImageSet, ProxyImages, to_device
from r2f_ext.errors import R2FError
from r2f_ext.pairs.memory import SampleBytes, budget, sample_bytes
from r2f_ext.pairs.starts import random_a
from r2f_ext.types import PairBatch, Target

PRECISIONS = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}
BATCH_GROUPS = 100  # groups per pass on a CPU: enough for the full speed of matrix products, few enough for the cache
GPU_SAMPLES = 4096  # samples per pass on a GPU, if its memory allows; with fewer, launches take longer than arithmetic
RESIDENT = 0.1  # largest share of a GPU's memory that the proxy images take
SHARD_BYTES = 1 << 30  # of the gradients in one file, which readers hold in memory
GPU_SHARD_BYTES = 256 << 20  # the same for pairs made on a GPU, where several files are written at once


class PairSource(Protocol):
    """Pairs that can be iterated over more than once, always in the same order.

    A batch holds gradients of the target's layers. It may hold updates of more layers: a source for some layers of an
    adapter still gives the updates of all layers, because they come from the same sample.
    """

    target: Target
    a: dict[str, Tensor]  # name -> A that all victims start from [r, d_in]

    @property
    def group_size(self) -> int:
        """Samples of one victim."""
        ...

    @property
    def one_step(self) -> bool:
        """Whether every victim took one step of plain SGD from B = 0, so that no gradient depends on A."""
        ...

    @property
    def per_victim_a(self) -> bool:
        """Whether each victim started from an A of its own (`PairBatch.a0`) instead of `a`."""
        ...

    def __len__(self) -> int:
        """Number of pairs."""
        ...

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[PairBatch]:
        """The pairs `start` to `stop`, in batches."""
        ...


class ProxyPairs(ABC):
    """What pairs that are made from proxy images during iteration share.

    Args:
        target: base model and adapted layers.
        a: name -> the adapter's own A [r, d_in].
        proxy: images and labels; pair i uses samples i * group_size to (i + 1) * group_size - 1.
        group_size: samples of one victim.
        precision: see `GeneratedPairs`.
        per_victim_a: a seed, to let every victim draw an A of its own (see `random_a`) instead of `a`.

    Raises:
        R2FError: the proxy has too few images for two victims, or the precision is unknown, or "tf32" on a CPU.
    """

    def __init__(
        self,
        target: Target,
        a: dict[str, Tensor],
        proxy: ProxyImages,
        group_size: int = 1,
        precision: str = "float32",
        per_victim_a: int | None = None,
    ) -> None:
        if len(proxy) < 2 * group_size:
            raise R2FError(
                f"proxy '{proxy.name}' has {len(proxy)} images: at least {2 * group_size} are needed, "
                "thousands for a good decoder."
            )
        check_precision(precision, target.base.device)
        self.target, self.a, self.proxy, self.group_size = target, a, proxy, group_size
        self.precision, self.a_seed = precision, per_victim_a

    @property
    @abstractmethod
    def batch_groups(self) -> int:
        """Groups of one pass, and so pairs of a batch."""

    def __len__(self) -> int:
        return len(self.proxy) // self.group_size

    @property
    def per_victim_a(self) -> bool:
        return self.a_seed is not None

    @cached_property
    def _sample(self) -> SampleBytes:
        return sample_bytes(self.target)

    @cached_property
    def _samples(self) -> ProxyImages:
        return resident(self.proxy, self.target.base.device)

    def factors_file(self, shard: int) -> None:  # noqa: B027
        """No file holds these pairs' gradients."""

    def _passes(self, start: int, stop: int | None) -> list[tuple[int, int]]:
        """(first victim, number of victims) of every pass over the pairs `start` to `stop`."""
        stop, step = len(self) if stop is None else min(stop, len(self)), self.batch_groups
        return [(first, min(step, stop - first)) for first in range(start, stop, step)]

    def _victims(self, first: int, groups: int) -> tuple[Tensor, Tensor, dict[str, Tensor] | None]:
        """Images and labels of the victims of one pass, and the A of each; None: all start from `a`."""
        images, labels = samples_of(self._samples, first, groups, self.group_size, self.target.base.device)
        return images, labels, None if self.a_seed is None else random_a(self.target, self.a_seed, first, groups)


class GeneratedPairs(ProxyPairs):
    """Pairs made from proxy images during iteration; nothing is kept.

    Args:
        target, a, proxy, per_victim_a: see `ProxyPairs`.
        group_size: samples of one victim step (batch size b).
        precision: "float32"; "tf32", for a GPU's faster products of rounded float32; or "bfloat16" to run the model
            under autocast (see `Capture`). Updates and factors are float32 either way; with bfloat16 their cosine to
            the float32 ones is about 0.9999.

    Raises:
        R2FError: the proxy has too few images for two pairs, or the precision is none of these, or "tf32" on a CPU.
    """

    one_step = True
    b = None  # PEFT's start: B = 0

    @property
    def recipe(self) -> dict[str, Any]:
        """How the pairs are made: for manifests."""
        return {**recipe_of(self.proxy, self.group_size, self.a_seed), "precision": self.precision}

    @property
    def batch_groups(self) -> int:
        device = self.target.base.device
        samples = budget(device) // self._sample.in_pass
        most = GPU_SAMPLES // self.group_size if device.type == "cuda" else BATCH_GROUPS
        return max(1, min(most, samples // self.group_size))

    @property
    def shard_groups(self) -> int:
        """Pairs of a file."""
        return shard_groups(self.batch_groups, self._sample.stored * self.group_size, self.target.base.device)

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[PairBatch]:
        upcoming = (self._victims(*one) for one in self._passes(start, stop))
        victims, precision = next(upcoming, None), PRECISIONS[self.precision]
        with Capture(self.target, precision, self.precision == "tf32", fused=True) as capture:
            while victims is not None:
                images, labels, a0 = victims
                gradient = capture(images, labels)
                updates = project(self.target, gradient, self.a if a0 is None else a0)
                if self.precision != "float32":
                    gradient = gradient.float32()
                victims = next(upcoming, None)  # the host prepares them while a GPU computes these
                yield PairBatch(updates, gradient, images, labels, a0)


def updates_of(pairs: PairSource, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
    """name -> updates of the pairs `start` to `stop`, [stop - start, d_out, r]."""
    parts = [batch.updates for batch in pairs.batches(start, stop)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def recipe_of(proxy: ProxyImages, group_size: int, a_seed: int | None) -> dict[str, Any]:
    """What the manifests of all kinds of pairs hold: how they were made."""
    made = {"proxy": proxy.name, "proxy_sha256": proxy.fingerprint, "group_size": group_size}
    return made if a_seed is None else {**made, "per_victim_a": a_seed}


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse a precision that is unknown, or not available on this device.

    Raises:
        R2FError: the sentence names it.
    """
    if precision not in PRECISIONS:
        raise R2FError(f"unknown precision '{precision}': choose {' or '.join(PRECISIONS)}.")
    if precision == "tf32" and device.type != "cuda":
        raise R2FError(f"tf32 is a precision of GPUs, and the base is on '{device.type}': use float32 or bfloat16.")


def shard_groups(batch_groups: int, stored: int, device: torch.device) -> int:
    """Number of pairs in a file: those of a pass, or fewer if their gradients, `stored` bytes each, make it too
    large."""
    most = GPU_SHARD_BYTES if device.type == "cuda" else SHARD_BYTES
    return max(1, min(batch_groups, most // max(1, stored)))


def resident(proxy: ProxyImages, device: torch.device) -> ProxyImages:
    """The proxy with its images on the GPU if they take a small part of its memory; otherwise unchanged."""
    if device.type != "cuda" or not isinstance(proxy, ImageSet):
        return proxy
    if proxy.images.nbytes > RESIDENT * torch.cuda.get_device_properties(device).total_memory:
        return proxy
    return replace(proxy, images=proxy.images.to(device), labels=proxy.labels.to(device))


def samples_of(proxy: ProxyImages, first: int, groups: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images [groups, size, c, h, w] and labels [groups, size] of the victims from `first` on."""
    rows = slice(first * size, (first + groups) * size)
    images, labels = proxy.batch(rows, device), to_device(proxy.labels[rows], device)
    return images.unflatten(0, (groups, size)), labels.unflatten(0, (groups, size))
