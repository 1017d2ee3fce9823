"""What a user waits for: a pass over pairs, an iteration of matching, a fit of ridge, an epoch of the MLP decoder.

These rows decide whether an optimisation is kept: a faster operator counts only if it makes one of them faster.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from measure import Functions
from plain import TV_WEIGHT, variation
from targets import all_linear, bare_model, initial_a
from torch import Tensor

from r2f_ext.capture import Capture
from r2f_ext.data import load_images
from r2f_ext.decoders import MLP, Ridge
from r2f_ext.inversion.matching import MatchingConfig, match
from r2f_ext.inversion.objectives import GradientObjective
from r2f_ext.models import load_base
from r2f_ext.pairs import GeneratedPairs
from r2f_ext.types import Gradient

pytestmark = pytest.mark.benchmark(group="end_to_end")
PAIRS, FITTED, BATCH = 400, 1000, 100
STEPS, STEP_SIZE = 10, 0.05


class Setting:
    """The embedded model, an adapter on all its linear layers, and public images."""

    def __init__(self, device: str) -> None:
        self.base = load_base(device=device)
        self.target = all_linear(self.base)
        self.proxy = load_images("embedded", count=FITTED)
        self.images, self.labels = self.proxy.batch(slice(0, PAIRS)).to(device), self.proxy.labels[:PAIRS].to(device)
        self.pairs = GeneratedPairs(self.target, initial_a(self.target), self.proxy)


@pytest.fixture(scope="module")
def setting(device: str) -> Setting:
    return Setting(device)


def bench_pair_pass(versus: Callable[..., None], setting: Setting) -> None:
    def make() -> Functions:
        return {
            "ours": lambda: [None for _ in setting.pairs.batches(0, PAIRS)],
            "bare model": bare_model(setting.base, setting.images, setting.labels, BATCH),
        }

    shape = [PAIRS, *setting.base.input_shape]
    versus("pair pass", shape, make, items=PAIRS, tolerance=None, captured=False)


@pytest.mark.parametrize("victims", [1, 8])
def bench_matching_iteration(versus: Callable[..., None], setting: Setting, victims: int) -> None:
    """The time of one step of `match`, against the same search written in plain PyTorch."""
    images, labels = setting.images[:victims], setting.labels[:victims]
    with Capture(setting.target) as capture:
        gradient = capture(images[:, None], labels[:, None])
    observed = {name: gradient.dense(name).detach() for name in setting.target.names}
    config = MatchingConfig(steps=STEPS, step_size=STEP_SIZE, tv_weight=TV_WEIGHT, second_order="double_backward")
    start = torch.full_like(images, 0.5)

    def ours() -> Tensor:
        objective = GradientObjective(Gradient(observed))
        return match(setting.target, objective, start, labels, config, "matching", "benchmark").images

    def make() -> Functions:
        return {"ours": ours, "plain PyTorch": lambda: plain_search(setting, observed, start, labels)}

    shape = [victims, *setting.base.input_shape]
    versus("matching iteration", shape, make, items=STEPS, tolerance=None, captured=False)


def plain_search(setting: Setting, observed: dict[str, Tensor], start: Tensor, labels: Tensor) -> Tensor:
    """Geiping et al., 2020: double backward through each victim's parameter gradients, signed Adam, total variation."""
    weights = [setting.base.model.get_parameter(f"{name}.weight").requires_grad_() for name in observed]
    images = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([images], lr=STEP_SIZE)
    for _ in range(STEPS):
        total = variation(images).sum() * TV_WEIGHT
        for victim, label in enumerate(labels):
            logits = setting.base.model(setting.base.normalize(images[victim : victim + 1]))
            gradients = torch.autograd.grad(F.cross_entropy(logits, label[None]), weights, create_graph=True)
            seen = (each[victim] for each in observed.values())
            cosines = [
                F.cosine_similarity(g.flatten(), o.flatten(), dim=0) for g, o in zip(gradients, seen, strict=True)
            ]
            total = total + 1 - torch.stack(cosines).mean()
        (images.grad,) = torch.autograd.grad(total, [images])
        images.grad.sign_()
        optimizer.step()
        with torch.no_grad():
            images.clamp_(0, 1)
    for weight in weights:
        weight.requires_grad_(False)
    return images.detach()


def bench_ridge_fit(versus: Callable[..., None], setting: Setting) -> None:
    """The time includes the pass over the pairs and the choice of settings."""
    shape = [FITTED, *setting.base.input_shape]
    versus(
        "ridge fit", shape, lambda: {"ours": lambda: Ridge().fit(setting.pairs, FITTED)}, tolerance=None, captured=False
    )


def bench_mlp_epoch(versus: Callable[..., None], setting: Setting) -> None:
    """The time includes the pass over the pairs."""
    shape = [FITTED, *setting.base.input_shape]
    functions: Functions = {"ours": lambda: MLP(epochs=1).fit(setting.pairs, FITTED)}
    versus("mlp fit, one epoch", shape, lambda: functions, tolerance=None, captured=False)
