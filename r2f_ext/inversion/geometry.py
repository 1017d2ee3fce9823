"""The geometry of a Vision Transformer, as counting and the closed forms use it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from timm.layers import Attention, PatchEmbed, RmsNorm
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import nn

from r2f_ext.capture import Capture
from r2f_ext.errors import R2FError
from r2f_ext.models.saved_head import is_head
from r2f_ext.types import BaseModel, Target

FIRST_QKV = "blocks.0.attn.qkv"
QKV_WEIGHT = f"{FIRST_QKV}.weight"
PATCH_EMBED = "patch_embed.proj"
PATCH_WEIGHT, POSITIONS = f"{PATCH_EMBED}.weight", "pos_embed"
PROBES = 2  # random images on which the tokens of a gradient are counted
MANY = 1 << 20  # tokens of a layer of an unknown structure: no limit is claimed
NORMS = (nn.LayerNorm, RmsNorm)


@dataclass(frozen=True)
class ViTGeometry:
    """Sizes and structure of a timm VisionTransformer.

    Attributes:
        patch: (height, width) of a patch in pixels.
        channels: image channels.
        grid: (rows, columns) of patches of the base's input.
        position_grid: (rows, columns) of the position embedding, which timm resamples to `grid` where they differ.
        patch_tokens: N, rows * columns.
        prefix_tokens: class, distillation and register tokens; their inputs to block 0 are public.
        width: d, the embedding dimension.
        has_pos_embed: there is a position embedding, whose gradient is the gradient at each token.
        has_embed_norm: a norm between the patch embedding and the positions.
        linear_qkv: block 0 reads its tokens through (a norm and) one qkv projection.
        norm_scales: unknown scalars per token that the norms before qkv bring into the linear equations.
    """

    patch: tuple[int, int]
    channels: int
    grid: tuple[int, int]
    position_grid: tuple[int, int]
    patch_tokens: int
    prefix_tokens: int
    width: int
    has_pos_embed: bool
    has_embed_norm: bool
    linear_qkv: bool
    norm_scales: int

    @property
    def positions(self) -> int:
        return self.position_grid[0] * self.position_grid[1]

    @property
    def tokens(self) -> int:
        return self.patch_tokens + self.prefix_tokens

    @property
    def patch_numbers(self) -> int:
        """Numbers in one patch, p^2 c."""
        return self.patch[0] * self.patch[1] * self.channels


def vit_geometry(model: nn.Module, input_size: tuple[int, int] | None = None) -> ViTGeometry:
    """Read the geometry of a timm VisionTransformer (any size, class token or none, registers, pre-norm).

    Args:
        input_size: (height, width) of what it reads; None: the size that it was built for. Others need
            `dynamic_img_size`, where timm resamples the position embedding.

    Raises:
        R2FError: not a timm VisionTransformer, its patches are not cut by one patchifying convolution, or they do
            not tile the input.
    """
    if not isinstance(model, VisionTransformer):
        raise R2FError(
            f"closed forms need a timm VisionTransformer, and the base is a {type(model).__name__}: only "
            "the statistical routes and the searches can run."
        )
    embed = model.patch_embed
    proj = getattr(embed, "proj", None)
    if not isinstance(embed, PatchEmbed) or not isinstance(proj, nn.Conv2d) or proj.kernel_size != proj.stride:
        raise R2FError(f"closed forms need patches cut by one convolution, and the base has a {type(embed).__name__}.")
    built_for = (embed.img_size[0], embed.img_size[1])
    size = built_for if input_size is None else input_size
    if size != built_for and not model.dynamic_img_size:
        raise R2FError(f"the base reads {built_for} images, not {size}: build it with dynamic_img_size.")
    patch = (proj.kernel_size[0], proj.kernel_size[1])
    grid = (size[0] // patch[0], size[1] // patch[1])
    if size != (patch[0] * grid[0], patch[1] * grid[1]):
        raise R2FError(f"patches of {patch[0]}x{patch[1]} do not tile the input {size} of the base.")
    norms = norms_before_qkv(model)
    return ViTGeometry(
        patch=patch,
        channels=proj.in_channels,
        grid=grid,
        position_grid=(embed.grid_size[0], embed.grid_size[1]),
        patch_tokens=grid[0] * grid[1],
        prefix_tokens=model.num_prefix_tokens,
        width=proj.out_channels,
        has_pos_embed=model.pos_embed is not None,
        has_embed_norm=not isinstance(embed.norm, nn.Identity),
        linear_qkv=norms is not None,
        norm_scales=sum(getattr(norm, "bias", None) is not None for norm in norms or ()),
    )


def base_geometry(base: BaseModel) -> ViTGeometry:
    """`vit_geometry` of a base at the size of its inputs."""
    return vit_geometry(base.model, (base.input_shape[1], base.input_shape[2]))


def measured_tokens(target: Target) -> dict[str, int]:
    """Adapted layer -> the largest number of tokens of one image at which its output has a gradient.

    Where the head reads the class token alone, that is one token in the last block's proj, fc1 and fc2: their gradients
    have rank 1. It is measured on PROBES random images.
    """
    base, generator = target.base, torch.Generator().manual_seed(0)
    dtype = next(base.model.parameters()).dtype
    images = torch.rand(PROBES, 1, *base.input_shape, generator=generator).to(base.device, dtype)
    labels = torch.randint(base.num_classes, (PROBES, 1), generator=generator).to(base.device)
    with Capture(target) as capture:
        delta = capture(images, labels).delta
    return {name: int(each.any(dim=2).sum(dim=1).max()) for name, each in delta.items()}


def structural_tokens(base: BaseModel, names: Collection[str]) -> dict[str, int]:
    """The same for any layers without a pass through the model: for a base without weights, or of exact gradients.

    One token in the classifier, and behind the last attention of a model that reads its class token alone.
    """
    model = base.model
    try:
        tokens = base_geometry(base).tokens
    except R2FError:
        tokens = MANY
    pooled = isinstance(model, VisionTransformer) and model.global_pool == "token"
    last = f"blocks.{len(model.blocks) - 1}." if isinstance(model, VisionTransformer) else None
    found = {}
    for name in names:
        behind = pooled and last is not None and name.startswith(last) and not name.endswith("attn.qkv")
        found[name] = 1 if behind or is_head(name) else tokens
    return found


def norms_before_qkv(model: VisionTransformer) -> list[nn.Module] | None:
    """The norms between the positions and block 0's qkv, in order; None where that path is something else."""
    block = model.blocks[0]
    if not isinstance(block, (Block, ResPostBlock)) or not isinstance(block.attn, Attention):
        return None
    path = [model.norm_pre, block.norm1] if isinstance(block, Block) else [model.norm_pre]
    norms = [norm for norm in path if not isinstance(norm, nn.Identity)]
    return norms if all(isinstance(norm, NORMS) for norm in norms) else None
