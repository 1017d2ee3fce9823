"""The interface of a decoder."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from r2f_ext.decoders.checkpoint import Checkpoint
from r2f_ext.pairs import PairSource
from r2f_ext.progress import Advance
from r2f_ext.types import Gradient, LoraUpdate, PairBatch

Updates = dict[str, Tensor]
"""name -> updates s G A^T (up to one positive factor a victim) [V, d_out, r]."""

Log = Callable[[str, float, int], None]
"""Is told a figure of the training: tag, value, epoch."""


def unheard(tag: str, value: float, epoch: int) -> None:
    """The log of nobody."""


class Decoder(ABC):
    """Maps updates of all layers to full gradients; each layer has its own map, fitted to one A.

    The layers are those of the pairs' target: batches may hold updates of more layers, which a map may read.

    Decoders are homogeneous: decode(c * u) = c * decode(u). The unknown learning rate of a victim
    therefore scales its decoded gradient and nothing else.
    """

    kind: ClassVar[str]
    log: Log = staticmethod(unheard)
    precision: torch.dtype = torch.float32  # float32 or bfloat16: of learning by gradient descent

    def fit(self, pairs: PairSource, count: int) -> None:
        """Fit to the first `count` pairs. `fit_together` fits several decoders in one walk."""
        _fit([self], pairs, count)

    @abstractmethod
    def start(self, pairs: PairSource, count: int) -> None:
        """Prepare to observe the first `count` pairs."""

    @abstractmethod
    def observe(self, batch: PairBatch) -> None:
        """Take in one batch; batches come in the order of the pairs."""

    @abstractmethod
    def finish(self) -> None:
        """Fit to what was observed."""

    @abstractmethod
    def decode(self, updates: Updates) -> Gradient:
        """Updates [V, d_out, r] a layer -> gradients [V, d_out, d_in] a layer."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What is saved: name -> tensor. `load_state` of a decoder of the same kind takes it back.

        The states of decoders of different layers of the same pairs, put together, are the state of one of all layers.
        """

    @abstractmethod
    def load_state(self, state: dict[str, Tensor], pairs: PairSource) -> None:
        """Restore a fitted decoder for the layers of `pairs.target`; `pairs` are those that it was fitted to."""


def fit_together(
    pairs: PairSource,
    count: int,
    kinds: Sequence[str] | None = None,
    advance: Advance = lambda units: None,
    checkpoint: Checkpoint | None = None,
    log: Log = unheard,
    precision: torch.dtype = torch.float32,
) -> list[Decoder]:
    """Fit one decoder of each of `kinds` (None: the closed-form default ones) to the first `count` pairs in one walk.

    Kinds that learn by gradient descent walk through a few pairs before, for their bases.

    Args:
        checkpoint: takes each kind as soon as it is fitted, and gives back those that it has.
        log: is told how kinds that learn by gradient descent get on, epoch by epoch.
        precision: float32 or bfloat16, what these kinds compute in while they learn; closed forms do not ask.
    """
    from r2f_ext.decoders import DEFAULT_KINDS, KINDS

    decoders = {kind: KINDS[kind]() for kind in kinds or DEFAULT_KINDS}
    there = [kind for kind in decoders if checkpoint is not None and checkpoint.holds(kind)]
    for kind in there:
        assert checkpoint is not None
        decoders[kind].load_state(checkpoint.load(kind, pairs.target.base.device), pairs)
    missing = [decoder for kind, decoder in decoders.items() if kind not in there]
    for decoder in missing:
        decoder.log, decoder.precision = log, precision
    _fit(missing, pairs, count, advance, checkpoint)
    return list(decoders.values())


def _fit(
    decoders: Sequence[Decoder],
    pairs: PairSource,
    count: int,
    advance: Advance = lambda units: None,
    checkpoint: Checkpoint | None = None,
) -> None:
    for decoder in decoders:
        decoder.start(pairs, count)
    for batch in pairs.batches(0, count) if decoders else ():
        for decoder in decoders:
            decoder.observe(batch)
        advance(len(batch.labels))
    for decoder in decoders:
        decoder.finish()
        if checkpoint is not None:
            checkpoint.save(decoder.kind, decoder.state())


def layer_seed(seed: int, name: str) -> int:
    """A seed for one layer, whichever others are there; torch's CPU stream reads 32 bits of it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "little")


def stack_updates(adapters: list[LoraUpdate]) -> Updates:
    """V adapters as a decoder's input: -B, [V, d_out, r] a layer, float32.

    After one SGD step from PEFT's start B = -lr * s * G A^T; after T small steps it is, to first order, that of
    the average gradient (the seed's Eq. 5-6).
    """
    return {name: -torch.stack([adapter.b[name].float() for adapter in adapters]) for name in adapters[0].b}


def add_up(pairs: PairSource, count: int, weights: Callable[[PairBatch, slice], dict[str, Tensor]]) -> Gradient:
    """sum_p w[v, p] G_p over the first `count` pairs, in one walk; gradients are written out a batch at a time.

    Args:
        weights: of a batch and its place among the pairs: name -> w [V, pairs of the batch].
    """
    total: dict[str, Tensor] = {}
    first = 0
    for batch in pairs.batches(0, count):
        rows = slice(first, first + len(batch.labels))
        for name, w in weights(batch, rows).items():
            gradients = batch.gradients.dense(name).flatten(1)
            if name not in total:
                total[name] = w.new_zeros(len(w), gradients.shape[1])
            total[name].addmm_(w, gradients)
        first = rows.stop
    shapes = {layer.name: (layer.d_out, layer.d_in) for layer in pairs.target.layers}
    return Gradient({name: gradient.unflatten(1, shapes[name]) for name, gradient in total.items()})
