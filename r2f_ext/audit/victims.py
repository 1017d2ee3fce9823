"""Real victims, trained by PEFT itself: one adapter per private image, all from the same A (docs/protocol.md)."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from r2f_ext.files import write_atomically
from r2f_ext.types import BaseModel

TARGET_MODULES = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@dataclass(frozen=True)
class VictimConfig:
    """The default victim of docs/protocol.md: r = 8, alpha = 16, all linear layers of the blocks, one step of SGD."""

    rank: int = 8
    alpha: int = 16
    steps: int = 1
    lr: float = 0.1
    seed: int = 0


def train_victim(base: BaseModel, image: torch.Tensor, label: int, folder: Path, config: VictimConfig) -> Path:
    """Train one adapter on one image with PEFT and torch.optim.SGD, and save it as PEFT does.

    Args:
        image: [c, h, w] in [0, 1].
        config: equal seeds give equal starts (A), as the clients of one server have.

    Returns:
        the adapter's folder. The random state of the caller is the same afterwards.
    """
    lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(TARGET_MODULES), lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):  # PEFT draws A on the CPU, also for a base on a GPU
        torch.default_generator.manual_seed(config.seed)
        model = get_peft_model(copy.deepcopy(base.model), lora)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=config.lr)
    inputs, labels = base.normalize(image[None].to(base.device)), torch.tensor([label], device=base.device)
    for _ in range(config.steps):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT looks for a base config, which a local base lacks
        write_atomically(folder, lambda temporary: model.save_pretrained(str(temporary)))
    return folder


def train_victims(
    base: BaseModel, images: torch.Tensor, labels: torch.Tensor, folder: Path, config: VictimConfig
) -> list[Path]:
    """One victim per image of [n, c, h, w], in the folders 000, 001, ..."""
    return [
        train_victim(base, image, int(label), folder / f"{index:03d}", config)
        for index, (image, label) in enumerate(zip(images, labels, strict=True))
    ]
