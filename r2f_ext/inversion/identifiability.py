"""Which routes can recover an image exactly, decided by counting before anything runs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from timm.layers import Attention, PatchEmbed, RmsNorm
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import nn

from r2f_ext.errors import R2FError
from r2f_ext.models import shape_of
from r2f_ext.types import BaseModel, Target

ROUTES = (
    "patch_position",
    "attention_rowspace",
    "adapter_rowspace",
    "matching",
    "amortised",
    "amortised_refined",
    "gauss_newton",
)
FIRST_QKV = "blocks.0.attn.qkv"
QKV_WEIGHT = f"{FIRST_QKV}.weight"
PATCH_WEIGHT, POSITIONS = "patch_embed.proj.weight", "pos_embed"
NORMS = (nn.LayerNorm, RmsNorm)
SEARCHES = {
    "matching": "a local search without a guarantee",
    "amortised": "a statistical estimate, always available and not exact",
    "amortised_refined": "a statistical estimate refined by a local search without a guarantee",
    "gauss_newton": "a search that ends exactly only from a start close enough",
}


@dataclass(frozen=True)
class ViTGeometry:
    """What counting needs to know of a timm VisionTransformer.

    Attributes:
        patch: (height, width) of a patch in pixels.
        channels: image channels.
        grid: (rows, columns) of patches of the base's input.
        position_grid: (rows, columns) of the position embedding, which timm resamples to `grid` where they differ.
        patch_tokens: N, rows * columns.
        prefix_tokens: class, distillation and register tokens; their inputs to block 0 are public.
        width: d, the embedding dimension.
        has_pos_embed: positions are told apart by a parameter, whose gradient is each token's gradient.
        has_embed_norm: a norm between the patch embedding and the positions.
        has_pre_norm: a norm between the positions and block 0 (CLIP).
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
    has_pre_norm: bool
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
        raise R2FError(f"closed forms need a timm VisionTransformer, and the base is a {type(model).__name__}.")
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
        has_pre_norm=not isinstance(model.norm_pre, nn.Identity),
        linear_qkv=norms is not None,
        norm_scales=sum(getattr(norm, "bias", None) is not None for norm in norms or ()),
    )


def base_geometry(base: BaseModel) -> ViTGeometry:
    """`vit_geometry` of a base at the size of its inputs."""
    return vit_geometry(base.model, (base.input_shape[1], base.input_shape[2]))


def norms_before_qkv(model: VisionTransformer) -> list[nn.Module] | None:
    """The norms between the positions and block 0's qkv, in order; None where that path is something else."""
    block = model.blocks[0]
    if not isinstance(block, (Block, ResPostBlock)) or not isinstance(block.attn, Attention):
        return None
    path = [model.norm_pre, block.norm1] if isinstance(block, Block) else [model.norm_pre]
    norms = [norm for norm in path if not isinstance(norm, nn.Identity)]
    return norms if all(isinstance(norm, NORMS) for norm in norms) else None


@dataclass(frozen=True)
class RouteVerdict:
    """Whether a route can recover an image exactly, by count.

    Attributes:
        route: one of ROUTES.
        identifiable: equations suffice for the unknowns. For the closed forms (patch_position and the two row
            spaces) the image then follows by a linear solve; for the searches and estimates it says only that
            the observation pins the image down, not that the route finds it (`why` says so).
        unknowns: numbers to solve for, per independent system for the closed forms, per group otherwise.
        equations: numbers observed for them.
        why: one sentence with the count.
    """

    route: str
    identifiable: bool
    unknowns: int
    equations: int
    why: str


def identifiability(
    base: BaseModel | nn.Module | str,
    *,
    adapter: Target | None = None,
    shared: Collection[str] | None = None,
    steps: int | None = None,
    batch: int = 1,
) -> dict[str, RouteVerdict]:
    """Count unknowns and equations of every route.

    Args:
        base: the public base; or a timm model; or a timm model's name, counted without its weights.
        adapter: which layers the victim adapts. None: exact gradients are observed. The two Phase 0 routes,
            patch_position and attention_rowspace, always refer to exact gradients.
        shared: names of the parameters whose exact gradients are observed; None: of all.
        steps: the victim's steps T, if known.
        batch: images in the group, b.

    Returns:
        route -> verdict, in the order of ROUTES.

    Raises:
        R2FError: steps or batch is not positive, or the base has no such model or parameter.
    """
    if batch < 1 or (steps is not None and steps < 1):
        raise R2FError(f"a group has at least one image and one step, not batch {batch} and steps {steps}.")
    base = base if isinstance(base, BaseModel) else shape_of(base)
    _check_names(base, shared)
    try:
        geometry = base_geometry(base)
    except R2FError as error:
        closed = [RouteVerdict(route, False, 0, 0, str(error)) for route in ROUTES[:3]]
    else:
        closed = [
            _patch_position(geometry, batch, shared),
            _attention_rowspace(geometry, batch, shared),
            _adapter_rowspace(geometry, adapter, steps, batch),
        ]
    verdicts = closed + [_search(route, base, adapter, shared, steps, batch) for route in SEARCHES]
    return {verdict.route: verdict for verdict in verdicts}


def _check_names(base: BaseModel, shared: Collection[str] | None) -> None:
    known = {name for name, _ in base.model.named_parameters()}
    unknown = sorted(set(shared or ()) - known)
    if unknown:
        raise R2FError(f"base '{base.spec}' has no parameter {unknown[0]}: name those of named_parameters().")


def _unshared(shared: Collection[str] | None, *names: str) -> str | None:
    """What keeps a route from an observer who lacks the gradients of `names`."""
    lacking = [] if shared is None else [name for name in names if name not in shared]
    return f"the gradient of {lacking[0]} is not shared" if lacking else None


def _patch_position(g: ViTGeometry, batch: int, shared: Collection[str] | None) -> RouteVerdict:
    unknowns, equations = batch * g.patch_tokens, g.width
    count = f"{unknowns} patches per pixel of a patch against width {equations}"
    obstacle = None
    if not g.has_pos_embed:
        obstacle = "the base has no position embedding, whose gradient is each token's gradient"
    elif g.has_embed_norm:
        obstacle = "a norm after the patch embedding hides each token's gradient"
    elif batch > 1:
        obstacle = f"the position embedding's gradient is summed over the {batch} images of the group"
    elif g.grid != g.position_grid and g.patch_tokens > g.positions:
        obstacle = f"the gradients of {g.patch_tokens} tokens were blended into those of {g.positions} positions"
    elif unknowns > equations:
        obstacle = "there are more patches than equations"
    obstacle = obstacle or _unshared(shared, PATCH_WEIGHT, POSITIONS)
    why = f"Needs the exact gradients of the patch and the position embedding for one image: {count}."
    if obstacle is not None:
        why = f"Not exact: {obstacle} ({count})."
    return RouteVerdict("patch_position", obstacle is None, unknowns, equations, why)


def _linear_obstacle(g: ViTGeometry, batch: int) -> str | None:
    """What keeps block 0's inputs from being one linear system a patch, whatever the count."""
    if not g.linear_qkv:
        return "block 0 does not read its tokens through a norm and one qkv projection"
    if g.has_embed_norm:
        return "a norm after the patch embedding is not modelled"
    if not g.has_pos_embed:
        return "without a position embedding every patch solves every position's equations"
    if batch > 1:
        # The difference of two images at any position solves the homogeneous equations of all positions.
        free = min((batch - 1) * g.patch_tokens, g.patch_numbers + g.norm_scales)
        return f"the differences between {batch} images leave {free} directions of every patch free"
    return None


def _attention_rowspace(g: ViTGeometry, batch: int, shared: Collection[str] | None) -> RouteVerdict:
    unknowns = g.patch_numbers + g.norm_scales
    spanned = batch * g.patch_tokens + g.prefix_tokens
    equations = max(g.width - spanned, 0)
    count = f"{unknowns} unknowns a patch against {equations} equations, width {g.width} less {spanned} tokens"
    obstacle = _linear_obstacle(g, batch)
    if obstacle is None and unknowns > equations:
        obstacle = "too few directions are orthogonal to all tokens"
    obstacle = obstacle or _unshared(shared, QKV_WEIGHT)
    why = f"Needs the exact gradient of {FIRST_QKV} for one image: {count}."
    if obstacle is not None:
        why = f"Not exact: {obstacle} ({count})."
    return RouteVerdict("attention_rowspace", obstacle is None, unknowns, equations, why)


def _adapter_rowspace(g: ViTGeometry, adapter: Target | None, steps: int | None, batch: int) -> RouteVerdict:
    unknowns = g.patch_numbers + g.norm_scales

    def verdict(identifiable: bool, equations: int, why: str) -> RouteVerdict:
        return RouteVerdict("adapter_rowspace", identifiable, unknowns, equations, why)

    if adapter is None or FIRST_QKV not in adapter.names:
        why = f"Not exact: no adapter on {FIRST_QKV}, so 0 equations for {unknowns} unknowns a patch."
        return verdict(False, 0, why)
    rank = adapter.layer(FIRST_QKV).rank
    obstacle = _linear_obstacle(g, batch)
    if steps == 1:
        equations = max(rank - g.tokens, 0)
        count = f"{unknowns} unknowns a patch against {equations} equations, rank {rank} less {g.tokens} tokens"
        note = "at T = 1 A has not moved, as B starts at 0, and only B's row space is left"
        if obstacle is None and unknowns > equations:
            obstacle = note
        why = f"At one plain SGD step with known A0, {note}: {count}."
    else:
        equations = max(g.width - g.tokens, 0) if rank >= g.patch_tokens else 0
        count = f"{unknowns} unknowns a patch against {equations} equations, width {g.width} less {g.tokens} tokens"
        if obstacle is None and rank < g.patch_tokens:
            obstacle = f"rank {rank} cannot hold the span of {g.patch_tokens} patch tokens"
        elif obstacle is None and unknowns > equations:
            obstacle = "too few directions are orthogonal to all tokens"
        why = f"Needs known A0 and T >= 2 plain SGD steps on one image, stored precisely: {count}."
    if obstacle is not None:
        why = f"Not exact: {obstacle} ({count})."
    return verdict(obstacle is None, equations, why)


def _search(
    route: str,
    base: BaseModel,
    adapter: Target | None,
    shared: Collection[str] | None,
    steps: int | None,
    batch: int,
) -> RouteVerdict:
    channels, height, width = base.input_shape
    unknowns = batch * channels * height * width
    if adapter is not None:
        moved = steps is not None and steps > 1
        equations = sum(layer.rank * (layer.d_out + moved * layer.d_in) for layer in adapter.layers)
        source = "of the LoRA update"
    elif shared is not None:
        equations = sum(base.model.get_parameter(name).numel() for name in set(shared))
        source = "of the shared gradients"
    else:
        linear = [module for module in base.model.modules() if isinstance(module, nn.Linear)]
        equations = sum(module.weight.numel() for module in linear)
        source = "of the exact gradients of the linear layers"
    enough = equations >= unknowns
    relation = "suffice for" if enough else "are too few for"
    why = f"{equations} numbers {source} {relation} {unknowns} pixel values; the route is {SEARCHES[route]}."
    return RouteVerdict(route, enough, unknowns, equations, why)
