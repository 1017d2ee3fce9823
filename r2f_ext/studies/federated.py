"""Clients that train an adapter in rounds and defend what they send, to measure what a defence costs in accuracy.

In a round every client starts from the common factors, trains as `simulate` does, applies its defence to the changes of
A and B, and sends the result; the server adds the mean over clients (McMahan et al. 2017, federated averaging).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from r2f_ext.data import ImageSet
from r2f_ext.decoders import Updates
from r2f_ext.decoders.kernel import block_of
from r2f_ext.pairs import Training, simulate
from r2f_ext.studies.scene import ALPHA, start_of, target_of
from r2f_ext.types import BaseModel, Target

RANK = 8  # at which the scale is ALPHA / r
RATE = 0.5  # learning rate of SGD: the largest of 0.1, 0.5 and 2 that trains, on public images of seed 0


@dataclass(frozen=True)
class Defence:
    """How a client defends the change that it sends against an observer; the defaults are the protocol's victim.

    Attributes:
        rank: of the adapter.
        blocks: share of the base's blocks, from the output on, whose layers are adapted; at least one block.
        batch: images of a client, all of them in every step; steps: its steps on them.
        dropout: LoRA's.
        clip: whether the change is scaled down to at most the bound (the norm of all its factors together).
        noise: standard deviation of the Gaussian noise on every entry, as a share of the bound (Abadi et al. 2016).
        rounding: "none", "float16", "bfloat16", or "sign": one bit per entry and the mean magnitude of each factor.
    """

    rank: int = RANK
    blocks: float = 1.0
    batch: int = 1
    steps: int = 1
    dropout: float = 0.0
    clip: bool = False
    noise: float = 0.0
    rounding: str = "none"

    @property
    def training(self) -> Training:
        """SGD on a client; each of several steps has its share of the learning rate of one step."""
        return Training(self.steps, self.batch, lr=RATE / self.steps, dropout=self.dropout)

    @property
    def of_one_image(self) -> Defence:
        """The same training on one image, undefended; shared by defences that differ only in what is reset here."""
        return replace(self, batch=1, clip=False, noise=0.0, rounding="none")

    def target(self, base: BaseModel) -> Target:
        """The adapted layers. Their scale is proportional to 1 / sqrt(r) (rsLoRA, Kalajdzievski 2023), so that every
        rank trains alike: a step changes W by lr scale^2 G A^T A, and A^T A has rank r.
        """
        names = target_of(base).names
        blocks = list(dict.fromkeys(map(block_of, names)))
        kept = blocks[-max(1, round(self.blocks * len(blocks))) :]
        layers = [name for name in names if block_of(name) in kept]
        return target_of(base, self.rank, layers, ALPHA * (self.rank / RANK) ** 0.5)

    def __call__(self, change: Updates, bound: float, generator: torch.Generator) -> Updates:
        """What P clients send in place of their changes, each name of a factor -> [P, ...]."""
        sent = change
        if self.clip:
            norm = torch.stack([each.flatten(1).square().sum(1) for each in change.values()]).sum(0).sqrt()
            scale = (bound / norm.clamp_min(1e-30)).clamp_max(1)
            sent = {name: each * scale[:, None, None] for name, each in sent.items()}
        if self.noise:
            sent = {
                n: u + self.noise * bound * torch.randn(u.shape, generator=generator).to(u) for n, u in sent.items()
            }
        return {name: _rounded(each, self.rounding) for name, each in sent.items()}


def _rounded(change: Tensor, rounding: str) -> Tensor:
    if rounding == "sign":
        return change.sign() * change.abs().mean((1, 2), keepdim=True)
    return change if rounding == "none" else change.to(getattr(torch, rounding)).to(change.dtype)


def federated_accuracy(
    base: BaseModel, defence: Defence, train: ImageSet, test: ImageSet, images: int, bound: float, seed: int
) -> Tensor:
    """Whether the adapted base classifies each test image correctly, bool [n], after one pass over the train images.

    Args:
        images: number of images per round, for images / defence.batch clients; the last round may have fewer.
        bound: of the clipping in the first round; it falls with the step size, linearly over the rounds.
        seed: of the start, the dropout and the noise.
    """
    target, device = defence.target(base), base.device
    a = start_of(target, seed)
    b = {layer.name: torch.zeros(layer.d_out, layer.rank, device=device) for layer in target.layers}
    generator = torch.Generator().manual_seed(seed)
    for first in range(0, len(train), images):
        rows = torch.arange(first, min(first + images, len(train)))
        shape = (-1, defence.batch)
        pixels, labels = (
            train.batch(rows, device).unflatten(0, shape),
            train.labels[rows].to(device).unflatten(0, shape),
        )
        left = 1 - first / len(train)  # the step size falls linearly, and with it the size of a change
        training = replace(defence.training, lr=left * defence.training.lr)
        clients = simulate(target, a, pixels, labels, training, seed + first, b)
        change = {f"A {name}": clients.a[name] - a[name] for name in target.names}
        change |= {f"B {name}": clients.b[name] - b[name] for name in target.names}
        mean = {name: each.mean(0) for name, each in defence(change, left * bound, generator).items()}
        a = {name: each + mean[f"A {name}"] for name, each in a.items()}
        b = {name: each + mean[f"B {name}"] for name, each in b.items()}
    return _correct(target, a, b, test)


@torch.no_grad()
def _correct(target: Target, a: Updates, b: Updates, test: ImageSet) -> Tensor:
    model = copy.deepcopy(target.base.model)
    for layer in target.layers:
        weight = model.get_submodule(layer.name).weight
        assert isinstance(weight, Tensor)
        weight += layer.scale * b[layer.name] @ a[layer.name]
    device = target.base.device
    parts = [test.batch(rows, device) for rows in torch.arange(len(test)).split(100)]
    found = torch.cat([model(target.base.normalize(images)).argmax(1) for images in parts])
    return found == test.labels.to(device)
