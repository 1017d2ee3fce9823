"""Phase 0 closed form: the image from the gradients of the patch embedding and of the positions.

The gradient of the position embedding is the loss gradient D [N, d] at every patch token, and the patch
embedding's gradient is D^T X, so the patches are X = pinv(D^T) G (the observation behind APRIL, Lu et al.,
CVPR 2022, which solves the first attention layer instead).
"""

from __future__ import annotations

import time
from collections.abc import Collection

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from r2f_ext.errors import R2FError
from r2f_ext.inversion.counting import closed_form_verdict, count_on, not_shared
from r2f_ext.inversion.geometry import PATCH_WEIGHT, POSITIONS, ViTGeometry, base_geometry
from r2f_ext.inversion.patches import Estimate, Prior, patch_prior, posterior_mean, to_image
from r2f_ext.inversion.route import Verdict
from r2f_ext.types import BaseModel, Reconstruction

ROUTE = "patch_position"


def count_patch_position(base: BaseModel, batch: int = 1, shared: Collection[str] | None = None) -> Verdict:
    """Compare the number of patches, the unknowns per pixel of a patch, with the width.

    Args:
        batch: images of the group; shared: parameters whose gradients are observed, None: all.
    """

    def count(g: ViTGeometry) -> Verdict:
        unknowns, equations = batch * g.patch_tokens, g.width
        refusal = None
        if not g.has_pos_embed:
            refusal = "the base has no position embedding, whose gradient is each token's gradient"
        elif g.has_embed_norm:
            refusal = "a norm after the patch embedding hides each token's gradient"
        elif batch > 1:
            refusal = f"the position embedding's gradient is summed over the {batch} images of the group"
        elif g.grid != g.position_grid and g.patch_tokens > g.positions:
            refusal = f"the gradients of {g.patch_tokens} tokens were blended into those of {g.positions} positions"
        elif unknowns > equations:
            refusal = "there are more patches than equations"
        return closed_form_verdict(
            ROUTE,
            unknowns,
            equations,
            refusal or not_shared(shared, PATCH_WEIGHT, POSITIONS),
            "Needs the exact gradients of the patch and the position embedding for one image",
            f"{unknowns} patches per pixel of a patch against width {equations}",
        )

    return count_on(ROUTE, base, count)


def invert_patch_position(base: BaseModel, gradients: dict[str, Tensor]) -> Reconstruction:
    """Solve for the image of a batch-1 gradient.

    Args:
        base: a timm VisionTransformer with learned positions and width d >= N patches.
        gradients: parameter name -> exact gradient; reads `patch_embed.proj.weight` [d, c, ph, pw] and
            `pos_embed` [1, tokens, d], any float dtype. The solve is float64.

    Returns:
        A reconstruction with images [1, c, h, w]; `details` holds the equations' noise and the expected error
        of a model input (both 0 in exact arithmetic).

    Raises:
        R2FError: the count refuses the route, or a gradient is missing, misshapen, not finite or zero.
    """
    started = time.perf_counter()
    verdict = count_patch_position(base)
    if not verdict.identifiable:
        raise R2FError(f"{ROUTE} is refused: {verdict.why}")
    geometry = base_geometry(base)
    weight = read_gradient(base, gradients, PATCH_WEIGHT).flatten(1)
    delta = _patch_delta(geometry, read_gradient(base, gradients, POSITIONS))
    estimate = _solve(delta, weight, _token_prior(base, geometry))
    image = to_image(base, estimate.solution, geometry.patch, geometry.grid)
    seconds = time.perf_counter() - started
    return Reconstruction(ROUTE, image, None, verdict.why, seconds, estimate.details(base))


def read_gradient(base: BaseModel, gradients: dict[str, Tensor], name: str) -> Tensor:
    """The named gradient in float64 on the base's device, checked against the parameter's shape.

    Raises:
        R2FError: missing, of another shape, NaN or infinite, or all zero.
    """
    if name not in gradients:
        raise R2FError(f"the gradient of {name} is missing: this route needs it.")
    gradient = gradients[name].detach().to(base.device, torch.float64)
    shape = base.model.get_parameter(name).shape
    if gradient.shape != shape:
        raise R2FError(f"the gradient of {name} has shape {tuple(gradient.shape)}, the base has {tuple(shape)}.")
    if not torch.isfinite(gradient).all():
        raise R2FError(f"the gradient of {name} holds NaN or infinity: the client's step diverged or is damaged.")
    if not gradient.any():
        raise R2FError(
            f"the gradient of {name} is all zero: the model fits its image perfectly (converged), or the layer was "
            "frozen; nothing of the image is in it."
        )
    return gradient


def _patch_delta(geometry: ViTGeometry, positions: Tensor) -> Tensor:
    """D [N, d] of the patch tokens: prefix tokens come first, or have no position at all (no_embed_class).

    Where timm resamples M positions p to R p for N tokens, their gradient is R^T D, solved for D by least squares.
    """
    gathered = positions[0, -geometry.positions :]
    if geometry.grid == geometry.position_grid:
        return gathered
    unit = torch.eye(geometry.positions, dtype=torch.float64, device=gathered.device)[None]
    resample = resample_abs_pos_embed(unit, list(geometry.grid), list(geometry.position_grid), num_prefix_tokens=0)[0]
    return torch.linalg.lstsq(resample.mT, gathered).solution


def _token_prior(base: BaseModel, geometry: ViTGeometry) -> Prior:
    """Prior of one pixel slot over all N tokens: the patch prior's mean and spread, tokens independent."""
    pixel = patch_prior(base, geometry.patch)
    spread = pixel.root.square().sum(1).mean().sqrt()
    size = geometry.patch_tokens
    return Prior(pixel.mean.mean().expand(size, 1), spread * torch.eye(size, dtype=torch.float64, device=spread.device))


def _solve(delta: Tensor, weight: Tensor, prior: Prior) -> Estimate:
    """Least squares for X in D^T X = G, each of the d equations scaled to the precision of its floats."""
    size = delta.norm(dim=0)
    used = size > 0
    scale = size[used, None].reciprocal()
    return posterior_mean(delta.T[used] * scale, weight[used] * scale, prior)
