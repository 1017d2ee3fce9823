"""What the decoders that learn by gradient descent share: streaming, losses, early stopping.

A pair is kept as what the network reads and as its gradient's core (`Core`), both over the norm of the update and in
float16 (the network computes in float32); dense gradients are never kept. The cosine of a prediction C_hat with the
whole gradient is exact from the core, since the directions are orthonormal: <C_hat, C> / (|C_hat| |G|). All layers
train together, one network each.
"""

from __future__ import annotations

from abc import abstractmethod
from copy import deepcopy

import torch
from torch import Tensor, nn

from r2f_ext import distributed
from r2f_ext.decoders.base import Decoder, Updates
from r2f_ext.decoders.core import Core
from r2f_ext.errors import R2FError
from r2f_ext.pairs import PairSource
from r2f_ext.types import FactoredGradient, Gradient, PairBatch

LOSSES = ("cosine", "mse", "cosine_norm")
NORM_WEIGHT = 0.1  # of the squared log-ratio of norms beside 1 - cosine
BATCH, PATIENCE = 64, 2
HELD_OUT = 400  # pairs for early stopping, at most a tenth


def pair_losses(predicted: Tensor, true: Tensor, norm: Tensor, loss: str) -> Tensor:
    """The loss of each pair [b], from cores [b, k] of the prediction and the truth, whose gradients have norm [b].

    `cosine`: 1 - cos. `mse`: |G_hat - G|^2 / |G|^2. `cosine_norm`: 1 - cos + 0.1 log(|G_hat| / |G|)^2.
    """
    inner, square = (predicted * true).sum(1), predicted.square().sum(1).clamp_min(1e-30)
    if loss == "mse":
        return (square - 2 * inner) / norm.square() + 1
    angle = 1 - inner / (square.sqrt() * norm)
    return angle if loss == "cosine" else angle + NORM_WEIGHT * (0.5 * square.log() - norm.log()).square()


class Learned(Decoder):
    """A decoder whose `network` maps what `read` makes of unit updates to cores, flat [b, k] a layer."""

    size: int  # of the core
    learning_rate: float
    most_epochs: int

    def __init__(self, loss: str = "cosine_norm", epochs: int | None = None, seed: int = 0) -> None:
        """How it learns.

        Args:
            loss: one of LOSSES (`cosine` leaves the magnitude open).
            epochs: at most; None: as many as the kind does by default.
            seed: of the weights and the order of the pairs.

        Raises:
            R2FError: no such loss, or no epoch.
        """
        if loss not in LOSSES:
            raise R2FError(f"unknown loss '{loss}': choose {', '.join(LOSSES)}.")
        self.loss, self.epochs, self.seed = loss, self.most_epochs if epochs is None else epochs, seed
        if self.epochs < 1:
            raise R2FError(f"epochs is {epochs}: at least 1.")

    @abstractmethod
    def build(self, pairs: PairSource, shapes: dict[str, torch.Size]) -> nn.Module:
        """The network for cores of these shapes [p, q]; its forward takes and returns name -> [b, .]."""

    @abstractmethod
    def read(self, units: Updates) -> Updates:
        """What the network reads of unit updates [b, ...] of every layer: name -> [b, ...] of the target's layers.

        It is kept for every pair.
        """

    def start(self, pairs: PairSource, count: int) -> None:
        if distributed.world_size() > 1:
            raise R2FError(f"{self.kind} trains all layers together: fit it in one process, without torchrun.")
        self.pairs = pairs
        self._build(Core.of(pairs, count, self.size))
        self.inputs: dict[str, list[Tensor]] = {name: [] for name in pairs.target.names}
        self.cores: dict[str, list[Tensor]] = {name: [] for name in pairs.target.names}
        self.true_norms: dict[str, list[Tensor]] = {name: [] for name in pairs.target.names}

    def _build(self, core: Core) -> None:
        self.core = core
        shapes = {n: torch.Size((core.left[n].shape[1], core.right[n].shape[1])) for n in core.left}
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self.network = self.build(self.pairs, shapes).to(self.pairs.target.base.device)
        self.shapes = shapes

    def observe(self, batch: PairBatch) -> None:
        units, norms = _units(batch.updates)
        cores = self.core(batch.gradients)
        for name, inputs in self.read(units).items():
            self.inputs[name].append(inputs.half())
            self.cores[name].append((cores[name].flatten(1) / norms[name][:, None]).half())
            self.true_norms[name].append(_norm(batch.gradients, name) / norms[name])

    def finish(self) -> None:
        inputs, cores, norms = (
            {name: torch.cat(each.pop(name)) for name in list(each)}
            for each in (self.inputs, self.cores, self.true_norms)
        )
        count = len(next(iter(norms.values())))
        fitted = count - min(HELD_OUT, max(1, count // 10))
        generator = torch.Generator().manual_seed(self.seed)
        optimizer = torch.optim.Adam(self.network.parameters(), lr=self.learning_rate)
        steps = self.epochs * -(-fitted // BATCH)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

        def loss(rows: Tensor) -> Tensor:
            predicted = self.network({name: each[rows].float() for name, each in inputs.items()})
            terms = [
                pair_losses(c, cores[n][rows].float(), norms[n][rows], self.loss).mean() for n, c in predicted.items()
            ]
            return torch.stack(terms).mean()

        held_out = torch.arange(fitted, count)
        best, kept, worse = float("inf"), deepcopy(self.network.state_dict()), 0
        for _ in range(self.epochs):
            for rows in torch.randperm(fitted, generator=generator).split(BATCH):
                optimizer.zero_grad()
                loss(rows).backward()
                optimizer.step()
                schedule.step()
            with torch.no_grad():
                now = sum(float(loss(rows)) * len(rows) for rows in held_out.split(BATCH)) / len(held_out)
            if now < best:
                best, kept, worse = now, deepcopy(self.network.state_dict()), 0
            elif (worse := worse + 1) >= PATIENCE:
                break
        self.network.load_state_dict(kept)

    @torch.no_grad()
    def decode(self, updates: Updates) -> Gradient:
        units, norms = _units(updates)
        parts = [self.network(each) for each in _split(self.read(units))]
        cores = {name: torch.cat([part[name] for part in parts]) for name in self.shapes}
        return Gradient(
            self.core.expand(
                {name: (c * norms[name][:, None]).unflatten(1, self.shapes[name]) for name, c in cores.items()}
            )
        )

    def state(self) -> dict[str, Tensor]:
        sides = (("left", self.core.left), ("right", self.core.right))
        core = {f"{side}/{name}": vectors for side, each in sides for name, vectors in each.items()}
        return {**core, **{f"network/{key}": value for key, value in self.network.state_dict().items()}}

    def load_state(self, state: dict[str, Tensor], pairs: PairSource) -> None:
        self.pairs = pairs
        names = pairs.target.names
        self._build(Core({n: state[f"left/{n}"] for n in names}, {n: state[f"right/{n}"] for n in names}))
        prefix = "network/"
        self.network.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})


def _units(updates: Updates) -> tuple[Updates, Updates]:
    """Updates of norm 1, and their norms [b]."""
    norms = {name: u.flatten(1).norm(dim=1).clamp_min(1e-30) for name, u in updates.items()}
    return {name: u / norms[name].view(-1, *[1] * (u.ndim - 1)) for name, u in updates.items()}, norms


def _norm(gradients: FactoredGradient, name: str) -> Tensor:
    """|D^T X| [P] from the factors: sum (D D^T) o (X X^T)."""
    x, delta = gradients.x[name], gradients.delta[name]
    return ((x @ x.mT) * (delta @ delta.mT)).sum((1, 2)).clamp_min(0).sqrt()


def _split(inputs: Updates) -> list[Updates]:
    count = len(next(iter(inputs.values())))
    return [{n: each[i : i + BATCH] for n, each in inputs.items()} for i in range(0, count, BATCH)]
