"""Generative prior: score distillation from a frozen diffusion model, as a gradient on the image.

Poole et al., "DreamFusion", 2022, Eq. 3: at a random time t the image x is noised to x_t = a x + s eps. Descending
w(t) (eps_hat(x_t, t) - eps) moves x towards images that are likely under the model. The model is not differentiated.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from r2f_ext.errors import R2FError, reason

UNET, WEIGHTS, SCHEDULER = "config.json", "diffusion_pytorch_model.safetensors", "scheduler_config.json"
TIMES = (0.02, 0.5)  # t is drawn from this range of the noise steps; later x_t hold no information on the image


class ScoreDistillation:
    """The gradient of a diffusion prior on images, for `match(..., prior=distillation.gradient)`.

    Args:
        unet: unconditional `diffusers.UNet2DModel` of 1 or 3 channels, trained on pixels scaled to [-1, 1]. With 1
            channel, the input is the mean over an image's channels.
        scheduler: its `diffusers.DDPMScheduler`; `prediction_type` may be epsilon, sample or v_prediction.
        weight: factor on the gradient, relative to the matching loss.
        seed: of times and noise, which depend only on the seed and the step. The global generator is not used.

    Raises:
        R2FError: another prediction type or number of channels.
    """

    def __init__(self, unet: Any, scheduler: Any, weight: float = 1e-3, seed: int = 0) -> None:
        self.unet, self.weight, self.seed = unet.eval().requires_grad_(False), weight, seed
        self.kind = scheduler.config["prediction_type"]
        self.alpha_bar = scheduler.alphas_cumprod
        self.channels = int(unet.config["in_channels"])
        if self.kind not in ("epsilon", "sample", "v_prediction"):
            raise R2FError(f"the prior predicts '{self.kind}': epsilon, sample or v_prediction is needed.")
        if self.channels not in (1, 3) or unet.config["out_channels"] != self.channels:
            raise R2FError(f"the prior's UNet reads {self.channels} channels: 1 or 3, and as many out, are needed.")

    @classmethod
    def from_folder(cls, folder: str | Path, weight: float = 1e-3, seed: int = 0) -> Self:
        """From a local folder in the format of diffusers (`unet/` and `scheduler/`, or both in one folder).

        Only safetensors are read, nothing is downloaded, and the files do not choose the class that is loaded.

        Raises:
            R2FError: diffusers is not installed, or the folder lacks a file or holds another kind of model.
        """
        unet_class, scheduler_class = diffusers_classes()
        unet, scheduler = _find(Path(folder), "unet", UNET), _find(Path(folder), "scheduler", SCHEDULER)
        _find(unet, ".", WEIGHTS)
        if (kind := _class_of(unet / UNET)) != "UNet2DModel":
            raise R2FError(f"'{folder}' holds a {kind}: the prior must be an unconditional UNet2DModel.")
        only_local: dict[str, Any] = {"local_files_only": True}
        try:
            return cls(
                unet_class.from_pretrained(str(unet), use_safetensors=True, low_cpu_mem_usage=False, **only_local),
                scheduler_class.from_pretrained(str(scheduler), **only_local),
                weight,
                seed,
            )
        except R2FError:
            raise
        except Exception as error:  # of json, safetensors or the constructors
            raise R2FError(f"'{folder}' cannot be read as a diffusion model: {reason(error)}.") from error

    @torch.no_grad()
    def gradient(self, images: Tensor, step: int) -> Tensor:
        """weight * w(t) (eps_hat - eps) for images [n, c, h, w] in [0, 1]: a gradient of that shape, to descend.

        w(t) = 1 - alpha_bar(t). Each image has its own time and noise, drawn from the seed and `step`.

        Raises:
            R2FError: the images do not have the size or channels that the model was trained on.
        """
        self._check(images)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**32)  # 32 bits are used
        pixels = images.float() if images.shape[1] == self.channels else images.float().mean(1, keepdim=True)
        low, high = (int(share * len(self.alpha_bar)) for share in TIMES)
        times = torch.randint(low, max(high, low + 1), (len(images),), generator=generator).to(images.device)
        noise = torch.randn(pixels.shape, generator=generator).to(images.device)
        variance = 1 - self.alpha_bar.to(images.device)[times].view(-1, 1, 1, 1)
        noisy = (1 - variance).sqrt() * (2 * pixels - 1) + variance.sqrt() * noise
        predicted = self.unet.to(images.device)(noisy, times).sample
        pull = variance * (as_noise(predicted, noisy, variance, self.kind) - noise)
        # The derivative of the mean over channels is 1 / channels for each of them.
        return (self.weight * self.channels / images.shape[1] * pull).expand_as(images).to(images.dtype)

    def _check(self, images: Tensor) -> None:
        size = self.unet.config["sample_size"]
        expected = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
        if size is not None and tuple(images.shape[-2:]) != expected:
            raise R2FError(
                f"the prior was trained on images of {expected}, not of {tuple(images.shape[-2:])}: train one for them."
            )
        if self.channels not in (1, images.shape[1]):
            raise R2FError(f"the prior reads {self.channels} channels, the images have {images.shape[1]}.")


def diffusers_classes() -> tuple[Any, Any]:
    """The classes `UNet2DModel` and `DDPMScheduler`.

    Raises:
        R2FError: diffusers is not installed.
    """
    try:
        from diffusers import DDPMScheduler, UNet2DModel
    except ImportError as error:
        raise R2FError("the generative prior needs diffusers: pip install 'r2f-ext[prior]'.") from error
    return UNet2DModel, DDPMScheduler


def as_noise(predicted: Tensor, noisy: Tensor, variance: Tensor, kind: str) -> Tensor:
    """eps_hat from the model's prediction at x_t = a x + s eps, with a^2 = 1 - variance and s^2 = variance.

    epsilon: eps itself; sample: x (Ho et al., 2020); v_prediction: a eps - s x (Salimans and Ho, 2022).
    """
    if kind == "epsilon":
        return predicted
    a, s = (1 - variance).sqrt(), variance.sqrt()
    return (noisy - a * predicted) / s if kind == "sample" else a * predicted + s * noisy


def _find(folder: Path, part: str, name: str) -> Path:
    """`folder/part` or `folder`, whichever holds the file `name`."""
    for place in (folder / part, folder):
        if (place / name).is_file():
            return place
    raise R2FError(f"'{folder}' has no {name}: pass a folder that diffusers saved, with safetensors.")


def _class_of(config: Path) -> str:
    try:
        return str(json.loads(config.read_text())["_class_name"])
    except (ValueError, KeyError, TypeError) as error:
        raise R2FError(f"{config} is not the config of a diffusers model.") from error
