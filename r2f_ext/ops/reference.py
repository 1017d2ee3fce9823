"""The operators in plain PyTorch: readable formulas, default kernels on every device, reference for the fast kernels.

Each function takes exactly the arguments of its schema and is registered for `CompositeExplicitAutograd`, so a kernel
for a particular device replaces it there. Gradients are not taken through these functions: `<op>.py` has an
explicit backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import (
    check_factored_matching_loss,
    check_lora_grad,
    check_lora_grad_tangent,
    check_matching_loss,
    check_signed_adam_step,
)
from .schemas import NAMESPACE


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64, everything else is summed (and returned) in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def from_rows(rows: Tensor) -> Tensor:
    """[..., r, d_out] -> [..., d_out, r] in the operators' layout: contiguous on CUDA, a transposed view elsewhere."""
    return rows.mT.contiguous() if rows.is_cuda else rows.mT


def lora_grad(
    x: Sequence[Tensor], delta: Sequence[Tensor], A: Sequence[Tensor], B: Sequence[Tensor], scales: Sequence[float]
) -> tuple[list[Tensor], list[Tensor]]:
    """G = delta^T x per layer and group; grad_A = scale B^T G, grad_B = scale G A^T, without ever forming G."""
    check_lora_grad(x, delta, A, B, scales)
    dtype = accumulation_dtype(x[0].dtype)
    grad_A, grad_B = [], []
    for x_l, delta_l, A_l, scale in zip(x, delta, A, scales, strict=True):
        u = x_l.to(dtype) @ A_l.to(dtype).mT  # [P, N, r]
        # (u^T delta)^T rather than delta^T u: the same numbers, faster in batched products on the CPU.
        grad_B.append(from_rows((u.mT @ delta_l.to(dtype)).mul_(scale)))
    for x_l, delta_l, B_l, scale in zip(x, delta, B, scales, strict=True) if B else ():
        v = delta_l.to(dtype) @ B_l.to(dtype)  # [P, N, r]
        grad_A.append((v.mT @ x_l.to(dtype)).mul_(scale))
    return grad_A, grad_B


def lora_grad_tangent(
    x: Sequence[Tensor],
    delta: Sequence[Tensor],
    dx: Sequence[Tensor],
    ddelta: Sequence[Tensor],
    A: Sequence[Tensor],
    scales: Sequence[float],
) -> list[Tensor]:
    """grad_B is bilinear, so each factor is moved in turn: d(delta^T u) = ddelta^T u + delta^T du."""
    check_lora_grad_tangent(x, delta, dx, ddelta, A, scales)
    dtype = accumulation_dtype(x[0].dtype)
    tangents = []
    for layer in zip(x, delta, dx, ddelta, A, strict=True):
        x_l, delta_l, dx_l, ddelta_l, A_l = (tensor.to(dtype) for tensor in layer)
        tangents.append((x_l @ A_l.mT).mT @ ddelta_l + (dx_l @ A_l.mT).mT @ delta_l)  # [K, P, r, d_out]
    return [from_rows(tangent.mul_(scale)) for tangent, scale in zip(tangents, scales, strict=True)]


# ---- Matching: distances between gradients, total variation, the optimizer's step ----------------------------------

TOTAL_VARIATION_EPS = 1e-12


def matching_loss(
    candidate: Sequence[Tensor],
    observed: Sequence[Tensor],
    weights: Sequence[float],
    kind: str,
    images: Tensor,
    tv_weight: float,
    isotropic: bool,
    with_gradients: bool,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Four sums for each layer and trial, and the loss as a function of them."""
    check_matching_loss(candidate, observed, images)
    sums = matching_sums(candidate, observed)
    settings = (weights, kind, images, tv_weight, isotropic)
    loss = _with_variation(matching_value(sums, weights, kind), candidate[0].dtype, images, tv_weight, isotropic)
    if with_gradients:
        return loss, sums, *matching_loss_backward(torch.ones_like(loss), candidate, observed, sums, *settings)
    return loss, sums, [], images.new_empty(0, dtype=accumulation_dtype(images.dtype))


def _with_variation(value: Tensor, dtype: torch.dtype, images: Tensor, tv_weight: float, isotropic: bool) -> Tensor:
    return (value + tv_weight * total_variation(images, isotropic)).to(accumulation_dtype(dtype))


def matching_sums(candidate: Sequence[Tensor], observed: Sequence[Tensor]) -> Tensor:
    """[L, T, 4]: <c, o>, |c|^2, |o|^2, |c - o|^2. In float64, because squares of small float32 numbers underflow."""
    layers = []
    for c, o in zip(candidate, observed, strict=True):
        c, o = _as_rows(c).double(), _as_rows(o).double()
        square = o.square().sum(1).expand(len(c))
        layers.append(torch.stack([(c * o).sum(1), c.square().sum(1), square, (c - o).square().sum(1)], dim=-1))
    return torch.stack(layers)


def _as_rows(tensor: Tensor) -> Tensor:
    """[T, ...] -> [T, elements], also for T = 0."""
    return tensor.reshape(len(tensor), tensor.shape[1:].numel())


def matching_value(sums: Tensor, weights: Sequence[float], kind: str) -> Tensor:
    """[L, T, 4] -> [T]; the weights sum to 1."""
    weight = sums.new_tensor(weights)[:, None]
    inner, candidate, observed, difference = sums.unbind(-1)
    if kind == "l2":
        return (weight * difference).sum(0)
    if kind == "layer_cosine":
        return (weight * (1 - inner * _one_over_norms(candidate, observed))).sum(0)
    inner, candidate, observed = ((weight * s).sum(0) for s in (inner, candidate, observed))
    return 1 - inner * _one_over_norms(candidate, observed)


def _one_over_norms(candidate: Tensor, observed: Tensor) -> Tensor:
    """1 / (|c| |o|), and 0 where one of them is zero, so that the cosine is 0 and has derivative 0."""
    zero = (candidate == 0) | (observed == 0)
    norms = torch.where(zero, 1.0, candidate).sqrt() * torch.where(zero, 1.0, observed).sqrt()
    return torch.where(zero, 0.0, 1 / norms)


def matching_coefficients(sums: Tensor, weights: Sequence[float], kind: str) -> tuple[Tensor, Tensor]:
    """a, b [L, T]: the gradient of the loss with respect to c is a o + b c."""
    weight = sums.new_tensor(weights)[:, None]
    if kind == "l2":
        twice = (2 * weight).expand(sums.shape[:2])
        return -twice, twice
    if kind == "cosine":
        sums = (weight[..., None] * sums).sum(0, keepdim=True)
    inner, candidate, observed, _ = sums.unbind(-1)
    zero = (candidate == 0) | (observed == 0)
    by_norms = weight * _one_over_norms(candidate, observed)
    return -by_norms, by_norms * inner / torch.where(zero, 1.0, candidate)


def matching_loss_backward(
    grad_loss: Tensor,
    candidate: Sequence[Tensor],
    observed: Sequence[Tensor],
    sums: Tensor,
    weights: Sequence[float],
    kind: str,
    images: Tensor,
    tv_weight: float,
    isotropic: bool,
) -> tuple[list[Tensor], Tensor]:
    """Written in differentiable operators: with sums that depend on the inputs, it can be differentiated again."""
    dtype = accumulation_dtype(candidate[0].dtype)
    gradients = []
    terms = [grad_loss.double() * k for k in matching_coefficients(sums, weights, kind)]
    for c, o, a, b in zip(candidate, observed, *terms, strict=True):
        rows = a[:, None] * _as_rows(o).double() + b[:, None] * _as_rows(c).double()
        gradients.append(rows.to(dtype).reshape(c.shape))
    return gradients, total_variation_backward(tv_weight * grad_loss, images, isotropic)


# float32 products of deltas are stored times this power of two, because deltas are tiny.
DELTA_UNIT = {torch.float32: 2.0**32, torch.float64: 1.0}


def factored_matching_loss(
    x: Sequence[Tensor],
    delta: Sequence[Tensor],
    observed: Sequence[Tensor],
    weights: Sequence[float],
    kind: str,
    images: Tensor,
    tv_weight: float,
    isotropic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, sums, and the tensor that the CPU's compiled backward reads; the gradients delta^T x are not formed."""
    check_factored_matching_loss(x, delta, observed, images)
    dtype = accumulation_dtype(x[0].dtype)
    sums = factored_sums(x, delta, observed)
    loss = _with_variation(matching_value(sums, weights, kind), dtype, images, tv_weight, isotropic)
    saved = [loss.new_empty(0)]
    for x_l, d, o in zip(x, delta, observed, strict=True) if loss.is_cpu else ():
        x_l, o, d = x_l.to(dtype), o.to(dtype), d.to(dtype) * DELTA_UNIT[dtype]
        saved += [d @ d.mT, x_l @ x_l.mT, d @ o]
    return loss, sums, torch.cat([product.flatten() for product in saved])


def factored_sums(x: Sequence[Tensor], delta: Sequence[Tensor], observed: Sequence[Tensor]) -> Tensor:
    """[L, T, 4]: <delta^T x, G*> = sum_n delta_n^T G* x_n; |delta^T x|^2 by Gram matrices."""
    layers = []
    for x_l, d, o in zip(x, delta, observed, strict=True):
        x_l, d, o = x_l.double(), d.double(), o.double()
        candidate = ((d @ d.mT) * (x_l @ x_l.mT)).sum((1, 2)).clamp_min(0)
        inner, square = ((d @ o) * x_l).sum((1, 2)), o.square().sum((1, 2)).expand(len(x_l))
        layers.append(torch.stack([inner, candidate, square, (candidate - 2 * inner + square).clamp_min(0)], dim=-1))
    return torch.stack(layers)


def factored_matching_loss_backward(
    grad_loss: Tensor,
    x: Sequence[Tensor],
    delta: Sequence[Tensor],
    observed: Sequence[Tensor],
    sums: Tensor,
    saved: Tensor,
    weights: Sequence[float],
    kind: str,
    images: Tensor,
    tv_weight: float,
    isotropic: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """With dL/dG = a G* + b G: dL/dx = delta dL/dG and dL/ddelta = x dL/dG^T. See matching_loss_backward."""
    dtype = accumulation_dtype(x[0].dtype)
    grads_x, grads_d = [], []
    terms = [(grad_loss.double() * k)[..., None, None] for k in matching_coefficients(sums, weights, kind)]
    for x_l, d, o, a, b in zip(x, delta, observed, *terms, strict=True):
        x_l, d, o = x_l.double(), d.double(), o.double()
        grads_x.append((a * (d @ o) + b * ((d @ d.mT) @ x_l)).to(dtype))
        grads_d.append((a * (x_l @ o.mT) + b * ((x_l @ x_l.mT) @ d)).to(dtype))
    return grads_x, grads_d, total_variation_backward(tv_weight * grad_loss, images, isotropic)


def total_variation(images: Tensor, isotropic: bool) -> Tensor:
    """Of images [T, c, h, w]: [T]. The formulas are in `ops.matching_loss`."""
    images = images.to(accumulation_dtype(images.dtype))
    if images.numel() == 0:
        return images.new_zeros(len(images))
    rows, columns = images.diff(dim=2), images.diff(dim=3)
    if isotropic:
        return _lengths(rows, columns)[0].sum((1, 2, 3)) / max(images.shape[1:].numel(), 1)
    return sum(d.abs().sum((1, 2, 3)) / max(d.shape[1:].numel(), 1) for d in (rows, columns))  # type: ignore[return-value]


def total_variation_backward(grad: Tensor, images: Tensor, isotropic: bool) -> Tensor:
    """Each pixel gathers from the differences that it is part of."""
    images = images.to(accumulation_dtype(images.dtype))
    if images.numel() == 0:
        return torch.zeros_like(images)
    rows, columns = images.diff(dim=2), images.diff(dim=3)
    grad = grad.to(images.dtype)[:, None, None, None]
    if isotropic:
        length, dy, dx = _lengths(rows, columns)
        factor = grad / max(images.shape[1:].numel(), 1) / length
        to_rows, to_columns = (factor * dy)[:, :, :-1], (factor * dx)[..., :-1]
    else:
        to_rows, to_columns = (grad * d.sign() / max(d.shape[1:].numel(), 1) for d in (rows, columns))
    return (
        F.pad(to_rows, (0, 0, 1, 0))
        - F.pad(to_rows, (0, 0, 0, 1))
        + F.pad(to_columns, (1, 0))
        - F.pad(to_columns, (0, 1))
    )


def _lengths(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sqrt(dx^2 + dy^2 + eps), dy and dx, all with the shape of the images."""
    dy, dx = F.pad(rows, (0, 0, 0, 1)), F.pad(columns, (0, 1))
    return (dx.square() + dy.square() + TOTAL_VARIATION_EPS).sqrt(), dy, dx


def signed_adam_step_(
    image: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    low: float | None,
    high: float | None,
    sign: bool,
) -> None:
    """Adam (Kingma and Ba, 2015, Algorithm 1) on the gradient or its sign, then the projection onto [low, high]."""
    check_signed_adam_step(image, gradient, exp_avg, exp_avg_sq)
    g = gradient.sign() if sign else gradient
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    size = exp_avg_sq.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    image.addcdiv_(exp_avg, size, value=-lr / (1 - beta1**step))
    if low is not None or high is not None:
        image.clamp_(low, high)


for _function in (
    lora_grad,
    lora_grad_tangent,
    matching_loss,
    matching_loss_backward,
    factored_matching_loss,
    factored_matching_loss_backward,
    signed_adam_step_,
):
    torch.library.impl(f"{NAMESPACE}::{_function.__name__}", "default", _function)
