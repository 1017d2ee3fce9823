"""A problem small enough to solve: one label, images of 12 directions, victims trained by `simulate`."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import torch
from cases import peft_start, tiny_base
from torch import Tensor

from r2f_ext.inversion.matching import MatchingConfig
from r2f_ext.inversion.route import Problem, Proxies, adapter_problem
from r2f_ext.models import InitialA
from r2f_ext.pairs import Training, simulate
from r2f_ext.types import LoraUpdate

LABEL, PROXIES, VICTIMS = 2, 80, 2


def posed(training: Training | None = None) -> tuple[Problem, Tensor]:
    """Two victims of one recipe (None: one plain step), 80 proxies of the same; and the victims' images."""
    base = tiny_base()
    target, a = peft_start(base, target_modules=["attn.qkv", "mlp.fc2"])
    torch.manual_seed(0)
    smooth = torch.randn(12, 768, dtype=torch.float64) * 0.05
    weights = torch.randn(PROXIES + VICTIMS, 12, dtype=torch.float64)
    images = (0.5 + weights @ smooth / 12**0.5).clamp(0, 1).unflatten(1, base.input_shape)
    labels = torch.full((len(images),), LABEL)
    made = simulate(target, a, images[:, None], labels[:, None], training or Training())
    adapters = [
        LoraUpdate({n: t[i] for n, t in made.a.items()}, {n: t[i] for n, t in made.b.items()})
        for i in range(PROXIES, PROXIES + VICTIMS)
    ]
    updates = {name: -b[:PROXIES].flatten(1) for name, b in made.b.items()}
    problem = adapter_problem(target, adapters)
    return (
        replace(
            problem,
            observed={name: -made.b[name][PROXIES:] for name in target.names},
            a={name: each.mean(0) for name, each in made.a.items()},
            steps=1 if training is None else training.steps,
            training=training,
            initial=SimpleNamespace(found=InitialA(a, "given", 1.0), named=True),
            proxies=Proxies(updates, images[:PROXIES], labels[:PROXIES], base.num_classes),
            matching=MatchingConfig(steps=4),
            refinement=MatchingConfig(steps=20, step_size=0.001, tv_weight=0.0),
        ),
        images[PROXIES:],
    )


def worst_psnr(found: Tensor, truth: Tensor) -> float:
    """The worst over images [V, c, h, w], in dB."""
    error = (found.double() - truth.double()).square().mean((1, 2, 3)).clamp_min(1e-30)
    return float((-10 * error.log10()).min())
