"""Many victims at once: each trains its own adapter on its own images, on one shared base model.

A step of all P victims is one forward and one backward over P * b samples: hooks add each victim's own
s * x A_p^T B_p^T to the adapted layers' outputs, and one call of `lora_grad` gives every victim's factor gradients.
torch.optim then steps the stacked factors: its optimizers work element by element, so the victims stay independent.
Step by step this equals PEFT's own training, to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r2f_ext.capture.hooks import Capture, as_tokens
from r2f_ext.data import ProxyImages
from r2f_ext.data.device import to_device
from r2f_ext.errors import R2FError
from r2f_ext.files import sha256_of
from r2f_ext.gpu import seeded
from r2f_ext.ops import lora_grad
from r2f_ext.pairs.generate import (
    GPU_SAMPLES,
    PRECISIONS,
    ProxyPairs,
    recipe_of,
    shard_groups,
)
from r2f_ext.pairs.memory import budget
from r2f_ext.types import FactoredGradient, PairBatch, Target

MAX_BATCH_SAMPLES = 100  # of one forward and backward on a CPU

SCHEDULES: dict[str, Callable[[float], float]] = {  # fraction of the training done, in [0, 1) -> learning rate factor
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


@dataclass(frozen=True)
class Training:
    """How a victim trains.

    Attributes:
        steps: T; batch: samples of a step, b.
        samples: images that a victim owns; None: `batch` of them. Step t takes the next b, cyclically.
        optimizer: "sgd" or "adamw" (torch.optim's, with their default betas and eps).
        lr, momentum, weight_decay: as in torch.optim; only SGD uses momentum.
        schedule: of the learning rate over the steps: "constant", "linear" or "cosine", the latter two falling to 0.
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
    def plain_step(self) -> bool:
        """Whether it is one step of plain SGD: B_1 = -lr s G A^T, whatever the other settings are."""
        return self.steps == 1 and self.optimizer == "sgd" and self.weight_decay == 0 and self.dropout == 0

    @property
    def owned(self) -> int:
        """Images of one victim."""
        return self.batch if self.samples is None else self.samples

    def batch_of(self, step: int) -> list[int]:
        """Which of its images a victim sees in a step."""
        return [(step * self.batch + i) % self.owned for i in range(self.batch)]

    def rates(self) -> list[float]:
        """The learning rate of every step."""
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
            [P, T * b * tokens, .], or written out (`FactoredGradient.of_dense`): what a decoder is to find (Liu et al.,
            Recover-to-Forget, Eq. 6).
        finite_steps: after how many steps the factors were still finite [P] int64; T unless the training diverged.
    """

    a: dict[str, Tensor]
    b: dict[str, Tensor]
    gradient: FactoredGradient
    finite_steps: Tensor


class AdaptedCapture(Capture):
    """Capture on a model whose layers carry one adapter a group; `b` is None while every B is still zero."""

    def __init__(self, target: Target, a: dict[str, Tensor], dropout: float, precision: str) -> None:
        super().__init__(target, PRECISIONS[precision], precision == "tf32", fused=True)
        self.a, self.dropout = a, dropout
        self.b: dict[str, Tensor] | None = None
        self.adapter_inputs: dict[str, Tensor] = {}  # name -> inputs of A after dropout [P, b * tokens, d_in]
        self._scales = {layer.name: layer.scale for layer in target.layers}

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        record = super()._hook(name)

        def adapt(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if self.b is None and not self.dropout:
                return record(module, args, output)
            tokens = as_tokens(module, args[0])
            x = tokens.reshape(len(self.a[name]), -1, tokens.shape[-1])
            if self.dropout:
                x = F.dropout(x, self.dropout)
                self.adapter_inputs[name] = x.detach()
            if self.b is None:
                return record(module, args, output)
            y = output.flatten(2).mT if isinstance(module, nn.Conv2d) else output
            # One product with the sum and the scale inside: y + s (x A^T) B^T.
            adapted = torch.baddbmm(
                y.reshape(*x.shape[:2], -1), x @ self.a[name].mT, self.b[name].mT, alpha=self._scales[name]
            ).reshape(y.shape)
            adapted = adapted.mT.reshape(output.shape) if isinstance(module, nn.Conv2d) else adapted
            return record(module, args, adapted)

        return adapt


def simulate(
    target: Target,
    a: dict[str, Tensor],
    images: Tensor,
    labels: Tensor,
    training: Training,
    seed: int = 0,
    b: dict[str, Tensor] | None = None,
    dense: bool = False,
    precision: str = "float32",
) -> Victims:
    """Train P victims.

    Args:
        a: name -> A at the start, [r, d_in] for all or [P, r, d_in].
        images: [P, training.owned, c, h, w] in [0, 1]; labels: [P, training.owned] int64.
        seed: of the dropout. With dropout a victim equals one of PEFT's in distribution only.
        b: name -> B at the start, [d_out, r] for all or [P, d_out, r]; None is PEFT's start, B = 0.
        dense: write the average gradient out, [P, d_out, d_in] a layer: less memory than its factors where
            T * b * tokens > d_out d_in / (d_out + d_in).
        precision: of the model, see `GeneratedPairs`. The factors that train stay in the images' dtype.

    Raises:
        R2FError: see `Capture`. A victim that diverges is not refused, see `Victims.finite_steps`.
    """
    victims, dtype = len(labels), images.dtype

    def stacked(factors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: each.to(dtype).expand(victims, *each.shape[-2:]).clone() for name, each in factors.items()}

    starts_at_zero = b is None
    zero = {layer.name: a[layer.name].new_zeros(layer.d_out, a[layer.name].shape[-2]) for layer in target.layers}
    a, b = stacked(a), stacked(zero if b is None else b)
    frozen = {layer.name for layer in target.layers if layer.saved}  # with A fixed, B is the change of the whole weight
    optimizer = training.optimizer_of([*(each for name, each in a.items() if name not in frozen), *b.values()])
    average = _Average(training.steps, dense)
    finite_steps = torch.full((victims,), training.steps, device=images.device)
    batches = to_device(torch.tensor([training.batch_of(step) for step in range(training.steps)]), images.device)
    with seeded(seed), AdaptedCapture(target, a, training.dropout, precision) as capture:
        capture.b = None if starts_at_zero else b
        for step, rate in enumerate(training.rates()):
            index = batches[step]
            gradient = capture(images[:, index], labels[:, index])
            if precision == "bfloat16":  # converted once, because everything is read twice
                wide = gradient.float32()
                gradient = FactoredGradient(dict(wide.x), dict(wide.delta))
            seen = capture.adapter_inputs if training.dropout else gradient.x
            found = lora_grad(
                [seen[name].to(dtype) for name in target.names],
                [gradient.delta[name] for name in target.names],
                [a[name] for name in target.names],
                None if capture.b is None else [b[name] for name in target.names],
                scales=[layer.scale for layer in target.layers],
            )
            # At B = 0 the gradient of A is zero, but weight decay and momentum still act on A.
            grad_A = found.grad_A or [torch.zeros_like(a[name]) for name in target.names]
            for name, of_a, of_b in zip(target.names, grad_A, found.grad_B, strict=True):
                a[name].grad, b[name].grad = of_a, of_b.contiguous()  # the layout of b, for fused optimizer steps
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            capture.b = b
            average.add(step, gradient)
            finite = torch.stack([b[name].flatten(1).isfinite().all(1) for name in target.names]).all(0)
            finite_steps = torch.where(finite, finite_steps, finite_steps.clamp_max(step))
    return Victims(a, b, average.result(), finite_steps)


class _Average:
    """sum_t delta_t^T x_t / T, as one pair of factors (the steps' tokens side by side) or written out."""

    def __init__(self, steps: int, dense: bool) -> None:
        self.steps = steps
        self.dense: dict[str, Tensor] | None = {} if dense else None
        self.factors: FactoredGradient | None = None

    def add(self, step: int, gradient: FactoredGradient) -> None:
        if self.dense is not None:
            for name, x in gradient.x.items():
                delta = gradient.delta[name]
                total = self.dense.setdefault(name, x.new_zeros(len(x), delta.shape[2], x.shape[2]))
                total.baddbmm_(delta.mT, x, alpha=1 / self.steps)
            return
        if self.steps == 1:
            self.factors = gradient
            return
        if self.factors is None:
            self.factors = FactoredGradient(self._buffers(gradient.x), self._buffers(gradient.delta))
        for name, x in gradient.x.items():
            tokens = slice(step * x.shape[1], (step + 1) * x.shape[1])
            self.factors.x[name][:, tokens] = x
            torch.div(gradient.delta[name], self.steps, out=self.factors.delta[name][:, tokens])

    def result(self) -> FactoredGradient:
        if self.dense is not None:
            return FactoredGradient.of_dense(self.dense)
        assert self.factors is not None
        return self.factors

    def _buffers(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.new_empty(len(t), self.steps * t.shape[1], t.shape[2]) for name, t in tensors.items()}


def _check_finite(victims: Victims, first: int, training: Training) -> None:
    """Refuse victims whose training diverged; they are numbered from `first` on.

    Raises:
        R2FError: the factors of a victim hold NaN or infinity.
    """
    diverged = (victims.finite_steps < training.steps).nonzero().flatten()
    if len(diverged):
        victim = int(diverged[0])
        step = int(victims.finite_steps[victim]) + 1
        raise R2FError(
            f"the training of victim {first + victim} diverged: its B holds NaN or infinity after step {step} of "
            f"{training.steps}; use a smaller learning rate (--lr {training.lr:g} is too large)."
        )


class SimulatedPairs(ProxyPairs):
    """Pairs of (change of B by training, average full gradient), made during iteration.

    The update is (B_0 - B_T) / sum of the learning rates. For one step of plain SGD from PEFT's start it is exactly the
    s G A^T of GeneratedPairs. Where A moves, A_T is given beside it (`PairBatch.a`).

    Args:
        target: base model and adapted layers.
        a: name -> the adapter's own A at its start [r, d_in].
        proxy: images and labels; victim i owns samples i * n to (i + 1) * n - 1, n = training.owned.
        training: how each victim trains.
        seed: of the dropout.
        b: name -> the B that all start from [d_out, r]; None is PEFT's start, B = 0.
        per_victim_a: a seed, to let every victim draw an A of its own (see `random_a`) instead of `a`.
        dense, precision: see `simulate`.

    Raises:
        R2FError: the proxy has too few images for two victims; during iteration, a victim's training diverged.
    """

    def __init__(
        self,
        target: Target,
        a: dict[str, Tensor],
        proxy: ProxyImages,
        training: Training,
        seed: int = 0,
        b: dict[str, Tensor] | None = None,
        per_victim_a: int | None = None,
        dense: bool = False,
        precision: str = "float32",
    ) -> None:
        super().__init__(target, a, proxy, training.owned, precision, per_victim_a)
        self.b, self.training, self.seed, self.dense = b, training, seed, dense

    @property
    def one_step(self) -> bool:
        return self.training.plain_step and self.b is None

    @property
    def recipe(self) -> dict[str, Any]:
        """How the pairs are made: for manifests."""
        made = recipe_of(self.proxy, self.group_size, self.a_seed)
        if self.b is not None:
            made["b_sha256"] = sha256_of(self.b.values())
        return {**made, "training": asdict(self.training), "seed": self.seed, "precision": self.precision}

    @property
    def batch_groups(self) -> int:
        """Number of victims that train together, so that one pass and the data saved over all steps fit the budget."""
        available, batch = budget(self.target.base.device), self.training.batch
        saved = self._sample.factors * batch * self.training.steps
        if self.dense:
            size = next(self.target.base.model.parameters()).element_size()
            saved = size * sum(layer.d_out * layer.d_in for layer in self.target.layers)
        most = GPU_SAMPLES if self.target.base.device.type == "cuda" else MAX_BATCH_SAMPLES
        samples = min(most, available // self._sample.in_pass)
        return max(1, min(samples // batch, available // saved))

    @property
    def shard_groups(self) -> int:
        """Pairs of a file."""
        tokens = self.training.batch * self.training.steps
        dense = 2 * sum(layer.d_out * layer.d_in for layer in self.target.layers)
        stored = dense if self.dense else self._sample.stored * tokens
        return shard_groups(self.batch_groups, stored, self.target.base.device)

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[PairBatch]:
        rate = sum(self.training.rates())
        for first, groups in self._passes(start, stop):
            images, labels, a0 = self._victims(first, groups)
            victims = simulate(
                self.target,
                self.a if a0 is None else a0,
                images,
                labels,
                self.training,
                self.seed + first,
                self.b,
                self.dense,
                self.precision,
            )
            _check_finite(victims, first, self.training)
            updates = {name: (b if self.b is None else b - self.b[name]) / -rate for name, b in victims.b.items()}
            a = None if self.one_step else victims.a
            yield PairBatch(updates, victims.gradient, images, labels, a0, a)
