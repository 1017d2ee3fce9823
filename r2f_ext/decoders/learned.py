"""Base class of the decoders that are trained by gradient descent: streaming, losses, early stopping.

For each pair the network's input and the core of the gradient (`Core`) are stored in float16, both divided by the norm
of the update; dense gradients are never stored. The cosine between a prediction C_hat and the full gradient is computed
exactly from the core, because the directions are orthonormal: <C_hat, C> / (|C_hat| |G|).

Training uses float32 or, with `precision` bfloat16, mixed precision: products and convolutions in bfloat16; weights,
optimizer steps and losses in float32 (Micikevicius et al. 2018). Inference uses float32.

All layers are trained in the same steps, but each has its own network, seed and early stopping. The result for a layer
does not depend on which other layers are present, so processes can divide the layers among themselves.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from r2f_ext.cuda_graph import Replayed
from r2f_ext.decoders.base import Decoder, Updates, joined, unit_updates
from r2f_ext.decoders.core import Core
from r2f_ext.errors import R2FError
from r2f_ext.files import seed_of
from r2f_ext.gpu import seeded
from r2f_ext.pairs import PairSource
from r2f_ext.types import FactoredGradient, Gradient, PairBatch

LOSSES = ("cosine", "mse", "cosine_norm")
NORM_WEIGHT = 0.1  # of the squared log-ratio of norms, relative to 1 - cosine
BATCH, PATIENCE = 64, 2  # pairs per step; epochs without improvement after which a layer stops
HELD_OUT = 400  # pairs for early stopping, at most a tenth


def pair_losses(predicted: Tensor, true: Tensor, norm: Tensor, loss: str) -> Tensor:
    """The loss of each pair [b] from predicted and true cores [b, k] and the norms [b] of the true full gradients.

    `cosine`: 1 - cos. `mse`: |G_hat - G|^2 / |G|^2. `cosine_norm`: 1 - cos + 0.1 log(|G_hat| / |G|)^2.
    """
    inner, square = (predicted * true).sum(1), predicted.square().sum(1).clamp_min(1e-30)
    if loss == "mse":
        return (square - 2 * inner) / norm.square() + 1
    angle = 1 - inner / (square.sqrt() * norm)
    return angle if loss == "cosine" else angle + NORM_WEIGHT * (0.5 * square.log() - norm.log()).square()


@dataclass(frozen=True)
class _Seen:
    """Stored data of n pairs, per layer: inputs [n, ...] and cores [n, k] in float16, norms of the gradients [n]."""

    inputs: dict[str, Tensor]
    cores: dict[str, Tensor]
    norms: dict[str, Tensor]


@dataclass
class _Best:
    """A layer's weights with the lowest held-out loss, and the number of epochs since."""

    state: dict[str, Any]
    loss: float = math.inf
    worse: int = 0


class Learned(Decoder):
    """A decoder with one network per layer that maps the output of `read` to flattened cores [b, k]."""

    size: int  # of the core
    learning_rate: float
    most_epochs: int

    def __init__(self, loss: str = "cosine_norm", epochs: int | None = None, seed: int = 0) -> None:
        """Set the training options.

        Args:
            loss: one of LOSSES (`cosine` does not determine the norm).
            epochs: maximum number of epochs; None: the default of the kind.
            seed: determines the initial weights and the order of the pairs.

        Raises:
            R2FError: unknown loss, or fewer than one epoch.
        """
        if loss not in LOSSES:
            raise R2FError(f"unknown loss '{loss}': choose {', '.join(LOSSES)}.")
        self.loss, self.epochs, self.seed = loss, self.most_epochs if epochs is None else epochs, seed
        if self.epochs < 1:
            raise R2FError(f"epochs is {epochs}: at least 1.")

    def prepare(self) -> None:
        """Compute from `self.pairs` whatever the networks and `read` need."""

    @abstractmethod
    def network(self, name: str, shape: torch.Size) -> nn.Module:
        """The network of one layer, whose cores have shape [p, q]."""

    def predict(self, inputs: Updates, precision: torch.dtype = torch.float32) -> Updates:
        """name -> inputs [b, ...] -> name -> predicted cores [b, p q], float32."""
        device = self.pairs.target.base.device.type
        with torch.autocast(device, precision, enabled=precision != torch.float32):
            found = {name: self.networks[name](each) for name, each in inputs.items()}
        return {name: core.float() for name, core in found.items()}

    @abstractmethod
    def read(self, units: Updates) -> Updates:
        """The networks' inputs, name -> [b, ...] for the target's layers, from unit updates [b, ...] of all layers.

        The inputs of every pair are stored, so they should be small.
        """

    def start(self, pairs: PairSource, count: int) -> None:
        self._build(pairs, Core.of(pairs, count, self.size))
        self.inputs: dict[str, list[Tensor]] = {name: [] for name in pairs.target.names}
        self.cores: dict[str, list[Tensor]] = {name: [] for name in pairs.target.names}
        self.true_norms: dict[str, list[Tensor]] = {name: [] for name in pairs.target.names}

    def _build(self, pairs: PairSource, core: Core) -> None:
        self.pairs, self.core = pairs, core
        self.shapes = {n: torch.Size((core.left[n].shape[1], core.right[n].shape[1])) for n in core.left}
        self.prepare()
        self.networks: dict[str, nn.Module] = {}
        for name, shape in self.shapes.items():
            with seeded(seed_of(f"{self.seed}/{name}")):
                self.networks[name] = self.network(name, shape).to(pairs.target.base.device)

    def observe(self, batch: PairBatch) -> None:
        units, norms = unit_updates(batch.updates)
        cores = self.core(batch.gradients)
        for name, inputs in self.read(units).items():
            self.inputs[name].append(inputs.half())
            self.cores[name].append((cores[name].flatten(1) / norms[name][:, None]).half())
            self.true_norms[name].append(_norm(batch.gradients, name) / norms[name])

    def finish(self) -> None:
        if not self.shapes:
            return
        seen = _Seen(*(joined(each) for each in (self.inputs, self.cores, self.true_norms)))
        count = len(next(iter(seen.norms.values())))
        fitted = count - min(HELD_OUT, max(1, count // 10))
        device = self.pairs.target.base.device  # each use of indices on the host would wait for a copy
        held_out = torch.arange(fitted, count, device=device).split(BATCH)
        generator = torch.Generator().manual_seed(self.seed)
        optimizer = torch.optim.Adam(self._weights(list(self.networks)), lr=self.learning_rate, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs * -(-fitted // BATCH))
        best = {name: _Best(deepcopy(network.state_dict())) for name, network in self.networks.items()}
        learning: list[str] = []
        for epoch in range(self.epochs):
            still = [name for name, layer in best.items() if layer.worse < PATIENCE]
            if not still:
                break
            if still != learning:
                learning, weights = still, self._weights(still)
                optimizer.zero_grad()  # gradients of layers that have stopped stay None, which Adam skips
                slopes = Replayed(partial(self._slopes, seen, learning))
            losses = []
            for rows in torch.randperm(fitted, generator=generator).to(device).split(BATCH):
                loss, *gradients = slopes(rows)
                for weight, gradient in zip(weights, gradients, strict=True):
                    weight.grad = gradient
                optimizer.step()
                schedule.step()
                losses.append((len(rows), loss.clone()))
            self._validate(seen, held_out, {name: best[name] for name in learning}, _mean(losses), epoch)
        for name, layer in best.items():
            self.networks[name].load_state_dict(layer.state)

    def _weights(self, names: list[str]) -> list[nn.Parameter]:
        return [p for name in names for p in self.networks[name].parameters()]

    def _slopes(self, seen: _Seen, names: list[str], rows: Tensor) -> tuple[Tensor | None, ...]:
        """The loss of each layer [len(names)] over the pairs `rows`, and its gradient (or None) at each weight."""
        weights = self._weights(names)
        for weight in weights:
            weight.grad = None
        loss = self._losses(seen, names, rows, self.loss, self.precision)
        loss.sum().backward()
        return loss.detach(), *(weight.grad for weight in weights)

    @torch.no_grad()
    def _validate(
        self, seen: _Seen, held_out: Sequence[Tensor], best: dict[str, _Best], losses: list[float], epoch: int
    ) -> None:
        """Compare each layer's held-out loss with its lowest so far, and log the metrics of the epoch."""
        names = list(best)
        now = _mean((len(rows), self._losses(seen, names, rows, self.loss)) for rows in held_out)
        angles = _mean((len(rows), self._losses(seen, names, rows, "cosine")) for rows in held_out)
        for name, loss, held_out_loss, angle in zip(names, losses, now, angles, strict=True):
            self.log(f"{self.kind}/{name}/loss", loss, epoch)
            self.log(f"{self.kind}/{name}/held_out_cosine", 1 - angle, epoch)
            if held_out_loss < best[name].loss:
                best[name].loss, best[name].worse = held_out_loss, 0
                best[name].state = deepcopy(self.networks[name].state_dict())
            else:
                best[name].worse += 1

    def _losses(
        self, seen: _Seen, names: list[str], rows: Tensor, loss: str, precision: torch.dtype = torch.float32
    ) -> Tensor:
        """Mean loss of each layer over the pairs `rows`, [len(names)]."""
        predicted = self.predict({name: seen.inputs[name][rows].float() for name in names}, precision)
        terms = [pair_losses(c, seen.cores[n][rows].float(), seen.norms[n][rows], loss) for n, c in predicted.items()]
        return torch.stack([term.mean() for term in terms])

    @torch.no_grad()
    def decode(self, updates: Updates) -> Gradient:
        if not self.shapes:
            return Gradient({})
        units, norms = unit_updates(updates)
        parts = [self.predict(each) for each in _split(self.read(units))]
        cores = {name: torch.cat([part[name] for part in parts]) for name in self.shapes}
        return Gradient(
            self.core.expand(
                {name: (c * norms[name][:, None]).unflatten(1, self.shapes[name]) for name, c in cores.items()}
            )
        )

    def state(self) -> dict[str, Tensor]:
        networks = {f"network/{n}/{k}": v for n, net in self.networks.items() for k, v in net.state_dict().items()}
        return self.core.state() | networks

    def load_state(self, state: dict[str, Tensor], pairs: PairSource) -> None:
        self._build(pairs, Core.of_state(state, pairs.target.names))
        for name, network in self.networks.items():
            prefix = f"network/{name}/"
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            try:
                network.load_state_dict(own)
            except RuntimeError as error:
                raise R2FError(
                    f"the saved {self.kind} decoder of {name} does not fit this version's network: run r2f fit again."
                ) from error


def _mean(losses: Iterable[tuple[int, Tensor]]) -> list[float]:
    """The mean of losses [layers], each weighted by its number of pairs."""
    counts, values = zip(*losses, strict=True)
    weighted = torch.stack([count * value for count, value in zip(counts, values, strict=True)])
    return (weighted.sum(0) / sum(counts)).tolist()


def _norm(gradients: FactoredGradient, name: str) -> Tensor:
    """|D^T X| [P] from the factors: sum (D D^T) o (X X^T)."""
    x, delta = gradients.x[name], gradients.delta[name]
    return ((x @ x.mT) * (delta @ delta.mT)).sum((1, 2)).clamp_min(0).sqrt()


def _split(inputs: Updates) -> list[Updates]:
    count = len(next(iter(inputs.values())))
    return [{n: each[i : i + BATCH] for n, each in inputs.items()} for i in range(0, count, BATCH)]
