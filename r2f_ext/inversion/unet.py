"""A U-Net that refines the kernel ridge estimate: it is trained on proxies to remove the errors of that estimate.

Input: the estimate as an image, and the whitened updates of all layers, which enter at the bottleneck. A proxy pair's
estimate is the leave-one-out estimate of its label's kernel ridge, so its errors are like a victim's.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r2f_ext.errors import R2FError
from r2f_ext.gpu import seeded
from r2f_ext.inversion.amortised import AmortisedInverter
from r2f_ext.progress import Advance, no_progress
from r2f_ext.types import Reconstruction

FITTED_ROWS = 2000  # pairs that the whitening is fitted to
GRID = 8  # height and width of the feature maps made of the features


@dataclass(frozen=True)
class UNetConfig:
    """Size and training of the net: AdamW with one cycle of the rate, mean squared error.

    Attributes:
        epochs: passes over nine tenths of the pairs; the last tenth selects the best epoch, or none of them.
        batch: pairs per step.
        rate: maximum learning rate.
        width: channels at full resolution; the lower resolutions have twice and four times as many.
        components: principal components per layer's unit updates.
        noise: standard deviation of the noise added to the whitened features in training.
    """

    epochs: int = 8
    batch: int = 100
    rate: float = 2e-3
    width: int = 24
    components: int = 64
    noise: float = 0.1
    seed: int = 0


class Whitening:
    """Per layer, principal components of unit updates [n, d_out * r], divided by s_i + 0.01 s_1 (s: deviations)."""

    def __init__(self, units: dict[str, Tensor], components: int) -> None:
        self.parts: dict[str, tuple[Tensor, Tensor]] = {}
        for name, unit in units.items():
            rows = unit[:FITTED_ROWS]
            mean = rows.mean(0)
            _, spread, basis = torch.svd_lowrank(rows - mean, q=min(components, *rows.shape), niter=2)
            spread = spread / math.sqrt(len(rows))
            self.parts[name] = mean, basis / (spread + 0.01 * spread[0]).clamp_min(1e-12)

    def __call__(self, units: dict[str, Tensor]) -> Tensor:
        """name -> [n, d_out * r] -> [n, layers * components]."""
        return torch.cat([(units[name] - mean) @ basis for name, (mean, basis) in self.parts.items()], dim=1)


class RefiningUNet(nn.Module):
    """Two levels of strided and transposed convolutions with skips; initially returns the estimate."""

    def __init__(self, channels: int, features: int, width: int) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GELU())

        def up(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(nn.ConvTranspose2d(inputs, outputs, 4, 2, 1), nn.GELU())

        self.enter = nn.Sequential(nn.Linear(features, 256), nn.GELU(), nn.Linear(256, 4 * width * GRID**2))
        self.first, self.second, self.third = (
            block(channels, width),
            block(width, 2 * width, 2),
            block(2 * width, 4 * width, 2),
        )
        self.middle = nn.Sequential(block(8 * width, 4 * width), block(4 * width, 4 * width))
        self.up, self.join = up(4 * width, 2 * width), block(4 * width, 2 * width)
        self.top, self.last = up(2 * width, width), block(2 * width, width)
        self.out = nn.Conv2d(width, channels, 3, 1, 1)
        nn.init.zeros_(self.out.weight)
        assert self.out.bias is not None
        nn.init.zeros_(self.out.bias)

    def forward(self, estimate: Tensor, features: Tensor) -> Tensor:
        """estimate [n, c, h, w], h and w multiples of 4; features [n, k] -> [n, c, h, w]."""
        fine = self.first(estimate - 0.5)
        half = self.second(fine)
        low = self.third(half)
        seen = self.enter(features).unflatten(1, (-1, GRID, GRID))
        if seen.shape[-2:] != low.shape[-2:]:
            seen = F.interpolate(seen, low.shape[-2:], mode="bilinear")
        low = self.middle(torch.cat([low, seen], dim=1))
        half = self.join(torch.cat([self.up(low), half], dim=1))
        return estimate + self.out(self.last(torch.cat([self.top(half), fine], dim=1)))


class UNetInverter:
    """Kernel ridge, then the net, trained here on the pairs of `ridge`.

    Args:
        ridge: the kernel ridge inverter on its proxy pairs.
        advance: called with 1 after each epoch.

    Raises:
        R2FError: the image height or width is not a multiple of 4.
    """

    def __init__(
        self, ridge: AmortisedInverter, config: UNetConfig | None = None, advance: Advance = no_progress
    ) -> None:
        channels, height, width = ridge.shape
        if height % 4 or width % 4:
            raise R2FError(f"the U-Net needs sides that are multiples of 4, got {height}x{width}: use kernel ridge.")
        self.ridge, self.config = ridge, config or UNetConfig()
        estimates = ridge.leave_one_out().clamp(0, 1).unflatten(1, ridge.shape)
        with seeded(self.config.seed):
            self.whitening = Whitening(ridge.units, self.config.components)  # svd_lowrank draws random numbers
            features = self._features(ridge.units, ridge.labels)
            net = RefiningUNet(channels, features.shape[1], self.config.width).to(features)
            self.net, self.held_out_psnr_db, self.ridge_psnr_db = _train(
                net, estimates, features, ridge.images.unflatten(1, ridge.shape), self.config, advance
            )

    def invert(self, updates: dict[str, Tensor], known_labels: Tensor | None = None) -> Reconstruction:
        """Updates of V victims [V, d_out, r] a layer -> images and labels; `known_labels`: see `find_labels`."""
        began = time.perf_counter()
        found = self.ridge.invert(updates, known_labels)
        assert found.labels is not None
        with torch.no_grad():
            images = self.net(found.images, self._features(self.ridge.unit_updates(updates), found.labels)).clamp(0, 1)
        why = (
            f"U-Net on the kernel ridge estimate, {len(self.ridge.images)} proxy pairs; held-out proxies: "
            f"{self.ridge_psnr_db:.1f} dB before, {self.held_out_psnr_db:.1f} dB after it"
        )
        details = {**found.details, "held_out_psnr_db": self.held_out_psnr_db, "ridge_psnr_db": self.ridge_psnr_db}
        return replace(found, images=images, why=why, seconds=time.perf_counter() - began, details=details)

    def _features(self, units: dict[str, Tensor], labels: Tensor) -> Tensor:
        one_hot = F.one_hot(labels, self.ridge.num_classes)
        features = self.whitening(units)
        return torch.cat([features, one_hot.to(features)], dim=1)


def _train(
    net: RefiningUNet, estimates: Tensor, features: Tensor, images: Tensor, config: UNetConfig, advance: Advance
) -> tuple[RefiningUNet, float, float]:
    """The net of the best epoch, its PSNR on the last tenth of the pairs, and that of the estimates there."""
    count = len(images) - len(images) // 10
    batches = max(1, count // config.batch)
    optimizer = torch.optim.AdamW(net.parameters(), config.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.rate, total_steps=config.epochs * batches)
    held_out = slice(count, None)
    start = best = _psnr(net, estimates[held_out], features[held_out], images[held_out])
    best_state = copy.deepcopy(net.state_dict())
    for _ in range(config.epochs):
        for rows in torch.randperm(count).tensor_split(batches):
            seen = features[rows] + config.noise * torch.randn_like(features[rows])
            loss = F.mse_loss(net(estimates[rows], seen), images[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        psnr = _psnr(net, estimates[held_out], features[held_out], images[held_out])
        if psnr > best:
            best, best_state = psnr, copy.deepcopy(net.state_dict())
        advance(1)
    net.load_state_dict(best_state)
    return net.eval(), best, start


@torch.no_grad()
def _psnr(net: RefiningUNet, estimates: Tensor, features: Tensor, images: Tensor) -> float:
    parts = zip(estimates.split(500), features.split(500), images.split(500), strict=True)
    errors = torch.cat([(net(e, f).clamp(0, 1) - i).square().flatten(1).mean(1) for e, f, i in parts])
    return float(-10 * torch.log10(errors.clamp_min(1e-10)).mean())
