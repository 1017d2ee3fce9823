"""The interface of a decoder, and functions that several kinds share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from r2f_ext.ops import add_weighted_gradients_
from r2f_ext.pairs import PairSource
from r2f_ext.types import Gradient, LoraUpdate, PairBatch, Target

Updates = dict[str, Tensor]
"""name -> updates s G A^T [V, d_out, r], up to one positive factor per victim."""

Log = Callable[[str, float, int], None]
"""Called with a training metric: tag, value, epoch."""


def no_log(tag: str, value: float, epoch: int) -> None:
    """A log that discards everything."""


class Decoder(ABC):
    """Maps updates of all layers to full gradients; each layer has its own map, fitted to one A.

    The decoded layers are those of the pairs' target. Batches may hold updates of further layers, which the map of any
    layer can use as input.

    Decoders are homogeneous: decode(c * u) = c * decode(u). The unknown learning rate of a victim
    therefore scales its decoded gradient and nothing else.
    """

    kind: ClassVar[str]
    log: Log = staticmethod(no_log)
    precision: torch.dtype = torch.float32  # for training by gradient descent: float32 or bfloat16

    def fit(self, pairs: PairSource, count: int) -> None:
        """Fit to the first `count` pairs. `fit_decoders` fits several decoders in one pass over the pairs."""
        self.start(pairs, count)
        for batch in pairs.batches(0, count):
            self.observe(batch)
        self.finish()

    @abstractmethod
    def start(self, pairs: PairSource, count: int) -> None:
        """Prepare to observe the first `count` pairs."""

    @abstractmethod
    def observe(self, batch: PairBatch) -> None:
        """Process one batch; batches are passed in the order of the pairs."""

    @abstractmethod
    def finish(self) -> None:
        """Complete the fit to the observed batches."""

    @abstractmethod
    def decode(self, updates: Updates) -> Gradient:
        """name -> updates [V, d_out, r] -> gradients, dense[name] [V, d_out, d_in]."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The tensors to save, by name; `load_state` of a decoder of the same kind restores them.

        The union of the states of decoders for disjoint layers of the same pairs is the state of a decoder for all of
        these layers.
        """

    @abstractmethod
    def load_state(self, state: dict[str, Tensor], pairs: PairSource) -> None:
        """Restore a fitted decoder for the layers of `pairs.target`; `pairs` must be the pairs it was fitted to."""


class MatrixDecoder(Decoder):
    """A decoder that multiplies a layer's updates by one matrix: matrices[name] [r, d_in]."""

    matrices: dict[str, Tensor]

    def decode(self, updates: Updates) -> Gradient:
        return Gradient({name: updates[name] @ each.to(updates[name]) for name, each in self.matrices.items()})

    def state(self) -> dict[str, Tensor]:
        return dict(self.matrices)

    def load_state(self, state: dict[str, Tensor], pairs: PairSource) -> None:
        self.matrices = {name: state[name] for name in pairs.target.names}


def unit_updates(updates: Updates) -> tuple[Updates, Updates]:
    """name -> updates [V, ...] divided by their norms, and name -> norms [V]. Zero updates stay zero."""
    norms = {name: u.flatten(1).norm(dim=1).clamp_min(1e-30) for name, u in updates.items()}
    return {name: u / norms[name].view(-1, *[1] * (u.ndim - 1)) for name, u in updates.items()}, norms


def joined(parts: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """Concatenate each layer's parts; they are removed from `parts` layer by layer to limit peak memory."""
    return {name: torch.cat(parts.pop(name)) for name in list(parts)}


def stack_updates(adapters: list[LoraUpdate]) -> Updates:
    """The input of a decoder from V adapters: name -> -B [V, d_out, r], float32.

    After one SGD step from PEFT's default start, B = -lr * s * G A^T (docs/methods.md, section 1). After T small steps
    the same holds, to first order, with a multiple of the average gradient in place of G (section 4).
    """
    return {name: -torch.stack([adapter.b[name].float() for adapter in adapters]) for name in adapters[0].b}


def with_saved(target: Target, updates: Updates, decoded: Gradient) -> Gradient:
    """`decoded` [V, d_out, d_in] per layer, with the exact gradient for layers whose update is the gradient
    (`AdaptedLayer.saved`)."""
    exact = {layer.name: updates[layer.name] for layer in target.layers if layer.saved and layer.name in decoded.dense}
    return Gradient({**decoded.dense, **exact})


def add_up(pairs: PairSource, count: int, weights: Callable[[PairBatch, slice], dict[str, Tensor]]) -> Gradient:
    """sum_p w[v, p] G_p over the first `count` pairs, in one pass over them; see `add_weighted_gradients_`.

    Args:
        weights: (batch, its rows among the pairs) -> name -> w [V, pairs in the batch], for the target's layers.

    Returns:
        dense[name] [V, d_out, d_in] in the dtype of the weights.
    """
    layers = pairs.target.layers
    totals: dict[str, Tensor] = {}
    first = 0
    for batch in pairs.batches(0, count) if layers else ():
        rows = slice(first, first + len(batch.labels))
        w = weights(batch, rows)
        if not totals:
            totals = {
                layer.name: w[layer.name].new_zeros(len(w[layer.name]), layer.d_out, layer.d_in) for layer in layers
            }
        x, delta = batch.gradients.x, batch.gradients.delta
        add_weighted_gradients_(list(totals.values()), *([each[name] for name in totals] for each in (w, x, delta)))
        first = rows.stop
    return Gradient(totals)
