"""Small bases, real PEFT victims and proxies for the tests of the pipeline."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from r2f_ext.data import ImageSet
from r2f_ext.decoders import Decoder, Projection
from r2f_ext.inversion.exact_gradients import exact_gradients
from r2f_ext.models.timm_base import unfuse_attention
from r2f_ext.pairs import PairSource
from r2f_ext.types import AdaptedLayer, BaseModel, Target

CONV = "patch_embed.proj"
LINEAR = ("blocks.0.attn.qkv", "blocks.1.mlp.fc2")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def tiny_base(dtype: torch.dtype = torch.float64, classes: int = 5) -> BaseModel:
    """A 16x16x3 ViT, patch 4, d = 24, 2 blocks, with every parameter moved off its initial value."""
    torch.manual_seed(3)
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=classes)
    model = model.to(dtype).eval()
    unfuse_attention(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return BaseModel(model.requires_grad_(False), "tiny", (3, 16, 16), (0.4, 0.5, 0.6), (0.3, 0.25, 0.2), classes)


def target_of(base: BaseModel, names: tuple[str, ...], rank: int = 4, scale: float = 2.0) -> Target:
    """The layers `names` of `base`, as if an adapter of that rank and scale changed them."""
    shapes = {name: base.model.get_submodule(name).weight.flatten(1).shape for name in names}
    return Target(base, tuple(AdaptedLayer(name, *shape, rank, scale) for name, shape in shapes.items()))


def samples(count: int, base: BaseModel, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Images [count, c, h, w] that a byte can hold, in [0, 1], and labels."""
    images = torch.randint(0, 256, (count, *base.input_shape)).to(dtype) / 255
    return images, torch.randint(0, base.num_classes, (count,))


def proxy_set(count: int, base: BaseModel, name: str = "noise") -> ImageSet:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, *base.input_shape), generator=generator).to(torch.uint8)
    return ImageSet(name, images, torch.randint(0, base.num_classes, (count,), generator=generator))


def peft_model(base: BaseModel, seed: int = 0, **lora) -> nn.Module:
    """`base` wrapped by PEFT itself."""
    torch.manual_seed(seed)
    options = {"r": 8, "lora_alpha": 16, "target_modules": ["attn.qkv"], **lora}
    return get_peft_model(copy.deepcopy(base.model), LoraConfig(**options))


def train(model: nn.Module, base: BaseModel, images: Tensor, labels: Tensor, lr: float = 0.1, steps: int = 1) -> None:
    """Plain torch.optim.SGD on everything that PEFT leaves trainable."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(base.normalize(images)), labels).backward()
        optimizer.step()


def save(model: nn.Module, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder))
    return folder


def victim(base: BaseModel, folder: Path, images: Tensor, labels: Tensor, steps: int = 1, **lora) -> Path:
    """Train one adapter with PEFT and save it."""
    model = peft_model(base, **lora)
    train(model, base, images, labels, steps=steps)
    return save(model, folder)


def peft_factors(model: nn.Module, name: str) -> tuple[Tensor, Tensor, float]:
    """A [r, d_in], B [d_out, r] and the scale, as PEFT holds them."""
    layer = model.base_model.model.get_submodule(name)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return a.detach().flatten(1), b.detach().flatten(1), layer.scaling["default"]


def changed_config(folder: Path, to: Path, **fields) -> Path:
    """A copy of an adapter folder with fields of its config replaced."""
    shutil.copytree(folder, to)
    config = json.loads((to / CONFIG).read_text())
    (to / CONFIG).write_text(json.dumps({**config, **fields}))
    return to


def changed_weights(folder: Path, to: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """A copy of an adapter folder with its tensors replaced by change(tensors)."""
    shutil.copytree(folder, to)
    save_file(change(load_file(folder / WEIGHTS)), to / WEIGHTS)
    return to


def with_patches_and_positions(folder: Path, to: Path, base: BaseModel, image: Tensor, label: Tensor) -> Path:
    """A copy of an adapter with patch and position embedding saved whole, after a step of 0.1 on an image [1, ...]."""
    (gradient,) = exact_gradients(base, image, label, ("patch_embed.proj.weight", "pos_embed"))
    moved = {
        f"base_model.model.{name}": (base.model.get_parameter(name) - 0.1 * each).detach()
        for name, each in gradient.items()
    }
    return changed_weights(folder, to, lambda weights: {**weights, **moved})


def gains_over_projection(decoder: Decoder, pairs: PairSource, fitted: int, count: int) -> dict[str, float]:
    """name -> the decoder's mean cosine to the true gradients of pairs `fitted` to `count`, less the projection's."""
    floor = Projection()
    decoder.fit(pairs, fitted)
    floor.fit(pairs, fitted)
    (batch,) = pairs.batches(fitted, count)
    mine, theirs = decoder.decode(batch.updates), floor.decode(batch.updates)
    gains = {}
    for name in pairs.target.names:
        true = batch.gradients.dense(name)
        gains[name] = float(cosine(mine.dense[name], true).mean() - cosine(theirs.dense[name], true).mean())
    return gains


def peft_start(base: BaseModel, **lora) -> tuple[Target, dict[str, Tensor]]:
    """The target and A of a PEFT model at its start."""
    return target_and_a(base, peft_model(base, **lora))


def target_and_a(base: BaseModel, model) -> tuple[Target, dict[str, Tensor]]:
    """The target and A, copied, of a PEFT model as it is."""
    layers, a = [], {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            factor_a, factor_b, scale = peft_factors(model, name)
            layers.append(AdaptedLayer(name, len(factor_b), factor_a.shape[1], len(factor_a), scale))
            a[name] = factor_a.clone()
    return Target(base, tuple(layers)), a


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Cosine of the rows of x and y, flattened, [n]."""
    return F.cosine_similarity(x.flatten(1).double(), y.flatten(1).double())
