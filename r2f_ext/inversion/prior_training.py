"""Training of a small diffusion model on public images, as a prior for `ScoreDistillation`.

Ho et al., "Denoising Diffusion Probabilistic Models", 2020: the mean squared error of a prediction at random times.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from r2f_ext.data import ImageSet
from r2f_ext.errors import R2FError
from r2f_ext.gpu import float32_products, seeded
from r2f_ext.inversion.prior import diffusers_classes
from r2f_ext.progress import Advance, no_progress

AVERAGE, RATE = 0.995, 1e-3  # decay of the averaged weights; largest step size
CHANNELS = (32, 48, 64)  # at the full, half and quarter size
REPORT_EVERY = 100  # steps


def build_unet(height: int, width: int, channels: tuple[int, int, int] = CHANNELS) -> Any:
    """A `diffusers.UNet2DModel` for gray images with attention only at a quarter of the size.

    With the default channels it has about 0.5 million parameters. Channels are multiples of 8, the last of 16.

    Raises:
        R2FError: diffusers is not installed, or the sides cannot be halved twice.
    """
    unet_class, _ = diffusers_classes()
    if height % 4 or width % 4:
        raise R2FError(f"a prior for images of {height}x{width} cannot be built: both sides must be multiples of 4.")
    size: Any = height if height == width else (height, width)
    return unet_class(
        sample_size=size,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
    )


@float32_products()
def train_prior(
    images: ImageSet,
    steps: int,
    prediction: str = "v_prediction",
    seed: int = 0,
    advance: Advance = no_progress,
    batch: int = 64,
    channels: tuple[int, int, int] = CHANNELS,
) -> tuple[Any, Any, list[float]]:
    """Train on the images' mean over channels, with AdamW and one cycle of the step size.

    Args:
        steps: of `batch` images each, drawn with replacement.
        prediction: "epsilon", "sample" or "v_prediction" (Salimans and Ho, 2022).
        seed: of weights, images, times and noise; the global generator is left as it was.
        advance: called after each step, every REPORT_EVERY steps with the mean loss since the last report.
        channels: see `build_unet`.

    Returns:
        a `UNet2DModel` with the exponential average of the weights, its `DDPMScheduler`, and every step's loss.

    Raises:
        R2FError: diffusers is not installed, or the images' sides are not multiples of 4.
    """
    with seeded(seed):
        height, width = images.images.shape[-2:]
        unet = build_unet(height, width, channels)
        _, scheduler_class = diffusers_classes()
        scheduler = scheduler_class(beta_schedule="squaredcos_cap_v2", prediction_type=prediction)
        average = {name: value.clone() for name, value in unet.state_dict().items()}
        optimizer = torch.optim.AdamW(unet.parameters(), lr=RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
        losses: list[float] = []
        for step in range(steps):
            clean = 2 * images.batch(torch.randint(len(images), (batch,))).mean(1, keepdim=True) - 1
            noise, times = torch.randn_like(clean), torch.randint(len(scheduler.alphas_cumprod), (batch,))
            noisy = scheduler.add_noise(clean, noise, times)
            loss = F.mse_loss(unet(noisy, times).sample, _target(scheduler, clean, noise, times))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            decay = min(AVERAGE, (1 + step) / (10 + step))
            for name, value in unet.state_dict().items():
                average[name].lerp_(value, 1 - decay)
            reports = (step + 1) % REPORT_EVERY == 0
            advance(1, f"step {step + 1}: loss {sum(losses[-REPORT_EVERY:]) / REPORT_EVERY:.4f}" if reports else "")
        unet.load_state_dict(average)
    return unet, scheduler, losses


def _target(scheduler: Any, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """What the model is to predict at these times."""
    kind = scheduler.config["prediction_type"]
    if kind == "epsilon":
        return noise
    found: Tensor = clean if kind == "sample" else scheduler.get_velocity(clean, noise, times)
    return found
