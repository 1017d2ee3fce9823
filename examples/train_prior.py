"""Train a small unconditional diffusion model on proxy images, as a prior for `r2f_ext.inversion.prior`.

    python examples/train_prior.py --out prior [--proxy fashion-mnist] [--steps 3000] [--prediction v_prediction]

Writes `unet/` and `scheduler/` as diffusers does (safetensors, about 2 MB), for gray 32x32 images. An exponential
average of the weights is saved. 3,000 steps take about 10 minutes on 2 CPU cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor

from r2f_ext import load_images
from r2f_ext.data import ImageSet
from r2f_ext.files import write_folder_atomically

DECAY = 0.995


def build() -> UNet2DModel:
    """About 0.5 million parameters: attention only at 8x8."""
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 48, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
    )


def train(
    images: ImageSet, steps: int, prediction: str, batch: int = 64, rate: float = 1e-3, seed: int = 0
) -> tuple[UNet2DModel, DDPMScheduler, list[float]]:
    """Train on the mean squared error of the prediction at random times (Ho et al. 2020); also return every loss."""
    torch.manual_seed(seed)
    unet = build()
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=prediction)
    average = {name: value.clone() for name, value in unet.state_dict().items()}
    optimizer = torch.optim.AdamW(unet.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
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
        decay = min(DECAY, (1 + step) / (10 + step))
        for name, value in unet.state_dict().items():
            average[name].lerp_(value, 1 - decay)
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {sum(losses[-100:]) / 100:.4f}", flush=True)
    unet.load_state_dict(average)
    return unet, scheduler, losses


def _target(scheduler: DDPMScheduler, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    kind = scheduler.config["prediction_type"]
    if kind == "v_prediction":
        return scheduler.get_velocity(clean, noise, times)
    return noise if kind == "epsilon" else clean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--proxy", default="embedded")
    parser.add_argument("--count", type=int)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--prediction", default="v_prediction", choices=("epsilon", "sample", "v_prediction"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    images = load_images(options.proxy, count=options.count, seed=options.seed)
    unet, scheduler, _ = train(images, options.steps, options.prediction, seed=options.seed)

    def write(folder: Path) -> None:
        unet.save_pretrained(folder / "unet")
        scheduler.save_pretrained(folder / "scheduler")

    write_folder_atomically(Path(options.out), write)


if __name__ == "__main__":
    main()
