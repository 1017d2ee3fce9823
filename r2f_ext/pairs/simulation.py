"""Many victims at once: each trains its own adapter on its own images, on one shared base model.

A step of all P victims is one forward and one backward over P * b samples: hooks add each victim's own
s * x A_p^T B_p^T to the adapted layers' outputs, and one call of `lora_grad` a layer gives every victim's factor
gradients. torch.optim then steps the stacked factors: its optimizers work element by element, so the victims stay
independent. Step by step this equals PEFT's own training, to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r2f_ext.capture.hooks import Capture, as_tokens
from r2f_ext.data import ImageSet
from r2f_ext.errors import R2FError
from r2f_ext.files import sha256_of
from r2f_ext.ops import lora_grad
from r2f_ext.types import FactoredGradient, PairBatch, Target

SAMPLES_AT_ONCE = 100  # of one forward and backward
SAMPLES_KEPT = 400  # of all steps: their factors are held until the last step, 1.6 MB a sample of the embedded model

SCHEDULES: dict[str, Callable[[float], float]] = {  # done share of the training in [0, 1) -> factor of the step size
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


@dataclass(frozen=True)
class Training:
    """How a victim trains.

    Attributes:
        steps: T; batch: samples of a step, b.
        samples: images that a victim owns; None: `batch` of them. Step t takes the next b, around and around.
        optimizer: "sgd" or "adamw" (torch.optim's, with their default betas and eps).
        lr, momentum, weight_decay: as torch.optim means them; momentum is SGD's.
        schedule: of the step size over the steps: "constant", "linear" or "cosine", both falling to 0.
        dropout: PEFT's lora_dropout, on the input of A.

    Raises:
        R2FError: a value that makes no sense; the sentence names it.
    """

    steps: int = 1
    batch: int = 1
    samples: int | None = None
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: str = "constant"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        wrong = [
            (self.steps < 1, f"steps is {self.steps}: at least 1"),
            (self.batch < 1, f"batch is {self.batch}: at least 1"),
            (self.samples is not None and self.samples < self.batch, f"samples is {self.samples}: at least the batch"),
            (self.optimizer not in ("sgd", "adamw"), f"optimizer is '{self.optimizer}': sgd or adamw"),
            (not self.lr > 0, f"lr is {self.lr}: above 0"),
            (self.momentum < 0, f"momentum is {self.momentum}: not below 0"),
            (self.momentum > 0 and self.optimizer == "adamw", "momentum belongs to sgd: leave it out with adamw"),
            (self.weight_decay < 0, f"weight_decay is {self.weight_decay}: not below 0"),
            (self.schedule not in SCHEDULES, f"schedule is '{self.schedule}': one of {', '.join(SCHEDULES)}"),
            (not 0 <= self.dropout < 1, f"dropout is {self.dropout}: in [0, 1)"),
        ]
        for is_wrong, sentence in wrong:
            if is_wrong:
                raise R2FError(f"the victims' training cannot be simulated: {sentence}.")

    @property
    def owned(self) -> int:
        """Images of one victim."""
        return self.batch if self.samples is None else self.samples

    def batch_of(self, step: int) -> list[int]:
        """Which of its images a victim sees in a step."""
        return [(step * self.batch + i) % self.owned for i in range(self.batch)]

    def rates(self) -> list[float]:
        """The step size of every step."""
        return [self.lr * SCHEDULES[self.schedule](step / self.steps) for step in range(self.steps)]

    def optimizer_of(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        if self.optimizer == "adamw":
            return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class Victims:
    """P trained victims.

    Attributes:
        a: name -> A after the last step [P, r, d_in]; b: name -> B [P, d_out, r].
        gradient: the full gradients of the adapted layers' weights, averaged over the steps, as factors
            [P, T * b * tokens, .]: what a decoder is to find (the seed's Eq. 6).
    """

    a: dict[str, Tensor]
    b: dict[str, Tensor]
    gradient: FactoredGradient


class AdaptedCapture(Capture):
    """Capture on a model whose layers carry one adapter a group; `b` is None while every B is still zero."""

    def __init__(self, target: Target, a: dict[str, Tensor], dropout: float) -> None:
        super().__init__(target)
        self.a, self.dropout = a, dropout
        self.b: dict[str, Tensor] | None = None
        self.adapter_inputs: dict[str, Tensor] = {}  # name -> what A saw [P, b * tokens, d_in]
        self._scales = {layer.name: layer.scale for layer in target.layers}

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        record = super()._hook(name)

        def adapt(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            a = self.a[name]
            tokens = as_tokens(module, args[0])
            x = F.dropout(tokens.reshape(len(a), -1, tokens.shape[-1]), self.dropout)
            self.adapter_inputs[name] = x.detach()
            if self.b is None:
                return record(module, args, output)
            b = self.b[name]
            update = ((x @ a.mT) @ b.mT).mul_(self._scales[name]).reshape(len(output), -1, b.shape[1])
            update = update.mT if isinstance(module, nn.Conv2d) else update
            return record(module, args, output + update.reshape(output.shape))

        return adapt


def simulate(
    target: Target, a: dict[str, Tensor], images: Tensor, labels: Tensor, training: Training, seed: int = 0
) -> Victims:
    """Train P victims from PEFT's start, B = 0.

    Args:
        a: name -> A at the start, [r, d_in] for all or [P, r, d_in].
        images: [P, training.owned, c, h, w] in [0, 1]; labels: [P, training.owned] int64.
        seed: of the dropout. With dropout a victim equals one of PEFT's in distribution only.
    """
    victims, dtype = len(labels), images.dtype
    a = {name: each.to(dtype).expand(victims, *each.shape[-2:]).clone() for name, each in a.items()}
    b = {
        layer.name: images.new_zeros(victims, layer.d_out, a[layer.name].shape[1], device=a[layer.name].device)
        for layer in target.layers
    }
    optimizer = training.optimizer_of([*a.values(), *b.values()])
    average = _Average(training.steps)
    with torch.random.fork_rng(), AdaptedCapture(target, a, training.dropout) as capture:
        torch.manual_seed(seed)
        for step, rate in enumerate(training.rates()):
            index = training.batch_of(step)
            gradient = capture(images[:, index], labels[:, index])
            for layer in target.layers:
                found = lora_grad(
                    capture.adapter_inputs[layer.name],
                    gradient.delta[layer.name],
                    a[layer.name],
                    None if capture.b is None else b[layer.name],
                    scale=layer.scale,
                )
                a[layer.name].grad, b[layer.name].grad = found.grad_A.contiguous(), found.grad_B
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            capture.b = b
            average.add(step, gradient)
    assert average.kept is not None
    return Victims(a, b, average.kept)


class _Average:
    """sum_t delta_t^T x_t / T as one pair of factors: the steps' tokens side by side."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.kept: FactoredGradient | None = None

    def add(self, step: int, gradient: FactoredGradient) -> None:
        if self.steps == 1:
            self.kept = gradient
            return
        if self.kept is None:
            self.kept = FactoredGradient(self._room(gradient.x), self._room(gradient.delta))
        for name, x in gradient.x.items():
            tokens = slice(step * x.shape[1], (step + 1) * x.shape[1])
            self.kept.x[name][:, tokens] = x
            torch.div(gradient.delta[name], self.steps, out=self.kept.delta[name][:, tokens])

    def _room(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.new_empty(len(t), self.steps * t.shape[1], t.shape[2]) for name, t in tensors.items()}


class SimulatedPairs:
    """Pairs of (what training did to B, average full gradient), made as they are walked through.

    The update kept is -B_T / sum of the step sizes: for one step of plain SGD exactly the s G A^T of GeneratedPairs.

    Args:
        target: base model and adapted layers.
        a: name -> the adapter's own A at its start [r, d_in].
        proxy: images and labels; victim i owns samples i * n to (i + 1) * n - 1, n = training.owned.
        training: how each victim trains.
        seed: of the dropout.

    Raises:
        R2FError: the proxy has too few images for two victims.
    """

    def __init__(
        self, target: Target, a: dict[str, Tensor], proxy: ImageSet, training: Training, seed: int = 0
    ) -> None:
        if len(proxy) < 2 * training.owned:
            raise R2FError(
                f"proxy '{proxy.name}' has {len(proxy)} images: at least {2 * training.owned} are needed, "
                "thousands for a good decoder."
            )
        self.target, self.a, self.proxy, self.training, self.seed = target, a, proxy, training, seed
        self.group_size = training.owned

    def __len__(self) -> int:
        return len(self.proxy) // self.group_size

    @property
    def recipe(self) -> dict[str, Any]:
        """How the pairs are made: for manifests."""
        proxy = {"proxy": self.proxy.name, "proxy_sha256": sha256_of([self.proxy.images, self.proxy.labels])}
        return {**proxy, "group_size": self.group_size, "training": asdict(self.training), "seed": self.seed}

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[PairBatch]:
        stop = len(self) if stop is None else min(stop, len(self))
        device, size = self.target.base.device, self.group_size
        batch = self.training.batch
        at_once = max(1, min(SAMPLES_AT_ONCE // batch, SAMPLES_KEPT // (batch * self.training.steps)))
        for first in range(start, stop, at_once):
            groups = min(at_once, stop - first)
            index = torch.arange(first * size, (first + groups) * size)
            images = self.proxy.batch(index).to(device).unflatten(0, (groups, size))
            labels = self.proxy.labels[index].to(device).unflatten(0, (groups, size))
            victims = simulate(self.target, self.a, images, labels, self.training, self.seed + first)
            rate = sum(self.training.rates())
            updates = {name: b.detach() / -rate for name, b in victims.b.items()}
            yield PairBatch(updates, victims.gradient, images, labels)
