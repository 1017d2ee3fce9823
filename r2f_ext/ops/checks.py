"""What the arguments of the operators must be.

The compiled kernels check for themselves, in C++; the reference and shape inference check here, and when a kernel
refuses its arguments this says why.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def check_lora_grad(x: Tensor, delta: Tensor, A: Tensor, B: Tensor | None, offsets: Tensor | None) -> int:
    """The number of groups."""
    given, x_shape, delta_shape, A_shape = (
        (x, delta, A) if B is None else (x, delta, A, B),
        x.shape,
        delta.shape,
        A.shape,
    )
    if offsets is None:
        if len(x_shape) != 3 or len(delta_shape) != 3 or x_shape[:2] != delta_shape[:2]:
            raise _bad_lora_grad("x must be [P, N, d_in] and delta [P, N, d_out] with the same P and N", given)
        groups = x_shape[0]
    else:
        if len(x_shape) != 2 or len(delta_shape) != 2 or x_shape[0] != delta_shape[0]:
            raise _bad_lora_grad("with offsets, x must be [M, d_in] and delta [M, d_out] with the same M", given)
        groups = _groups_of(offsets, x.device)
    d_in = x_shape[-1]
    if len(A_shape) not in (2, 3) or A_shape[-1] != d_in or (len(A_shape) == 3 and A_shape[0] != groups):
        raise _bad_lora_grad("A must be [r, d_in] or [P, r, d_in]", given)
    if A_shape[-2] < 1:
        raise _bad_lora_grad("the rank must be at least 1", given)
    if B is not None:
        one = (delta_shape[-1], A_shape[-2])
        if B.shape not in (one, (groups, *one)):
            raise _bad_lora_grad("B must be [d_out, r] or [P, d_out, r]", given)

    dtype, device = x.dtype, x.device
    for tensor in given:
        if tensor.dtype != dtype or dtype not in DTYPES:
            raise TypeError(
                "lora_grad: x, delta, A and B must share one dtype of float32, float64, bfloat16; got "
                + ", ".join(str(t.dtype).removeprefix("torch.") for t in given)
            )
        if tensor.device != device:
            devices = ", ".join(str(t.device) for t in given)
            raise ValueError(f"lora_grad: all tensors must be on one device; got {devices}")
    return groups


def _groups_of(offsets: Tensor, device: torch.device) -> int:
    if offsets.dtype != torch.int64:
        raise TypeError(f"lora_grad: offsets must be int64; got {str(offsets.dtype).removeprefix('torch.')}")
    if offsets.ndim != 1 or offsets.shape[0] < 1:
        raise ValueError(f"lora_grad: offsets must be [P + 1]; got {list(offsets.shape)}")
    if offsets.device != device:
        raise ValueError(f"lora_grad: offsets must be on the device of x, {device}; got {offsets.device}")
    return offsets.shape[0] - 1


def _bad_lora_grad(what: str, tensors: tuple[Tensor, ...]) -> ValueError:
    shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in zip(("x", "delta", "A", "B"), tensors, strict=False))
    return ValueError(f"lora_grad: {what}; got {shapes}")


def check_lora_grad_tangent(
    x: Tensor, delta: Tensor, dx: Tensor | None, ddelta: Tensor | None, A: Tensor, B: Tensor | None
) -> int:
    """The number of directions."""
    named = {"x": x, "delta": delta, "dx": dx, "ddelta": ddelta, "A": A, "B": B}
    given = {name: tensor for name, tensor in named.items() if tensor is not None}
    if x.ndim != 3 or delta.ndim != 3 or x.shape[:2] != delta.shape[:2]:
        raise _bad_tangent("x must be [P, N, d_in] and delta [P, N, d_out] with the same P and N", given)
    if dx is None and ddelta is None:
        raise ValueError("lora_grad_tangent: dx or ddelta is needed")
    if dx is not None and dx.shape[1:] != x.shape:
        raise _bad_tangent("dx must be [K, P, N, d_in]", given)
    if ddelta is not None and (ddelta.shape[1:] != delta.shape or (dx is not None and len(dx) != len(ddelta))):
        raise _bad_tangent("ddelta must be [K, P, N, d_out], with the K of dx", given)
    groups, _, d_in = x.shape
    if A.ndim not in (2, 3) or A.shape[-1] != d_in or A.shape[:-2] not in ((), (groups,)):
        raise _bad_tangent("A must be [r, d_in] or [P, r, d_in]", given)
    if A.shape[-2] < 1:
        raise _bad_tangent("the rank must be at least 1", given)
    one = (delta.shape[2], A.shape[-2])
    if B is not None and B.shape not in (one, (groups, *one)):
        raise _bad_tangent("B must be [d_out, r] or [P, d_out, r]", given)

    if x.dtype not in DTYPES or any(t.dtype != x.dtype for t in given.values()):
        dtypes = ", ".join(f"{name} {str(t.dtype).removeprefix('torch.')}" for name, t in given.items())
        raise TypeError(
            f"lora_grad_tangent: all tensors must share one dtype of float32, float64, bfloat16; got {dtypes}"
        )
    if any(t.device != x.device for t in given.values()):
        devices = ", ".join(f"{name} {t.device}" for name, t in given.items())
        raise ValueError(f"lora_grad_tangent: all tensors must be on one device; got {devices}")
    return len(dx if dx is not None else given["ddelta"])


def _bad_tangent(what: str, given: dict[str, Tensor]) -> ValueError:
    shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in given.items())
    return ValueError(f"lora_grad_tangent: {what}; got {shapes}")


def check_decode(inputs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    if not inputs or not weights or len(weights) % len(inputs) or len(biases) != len(weights):
        raise ValueError(
            "decode: every decoder needs the same number of weights and as many biases, at least 1; got "
            f"{len(inputs)} inputs, {len(weights)} weights and {len(biases)} biases"
        )
    depth, dtype, device = len(weights) // len(inputs), inputs[0].dtype, inputs[0].device
    if dtype not in DTYPES:
        raise TypeError(f"decode: inputs must be float32, float64 or bfloat16; got {dtype}")
    for i, z in enumerate(inputs):
        if z.ndim != 2:
            raise ValueError(f"decode: inputs must be [b, n]; inputs[{i}] is {list(z.shape)}")
        width = z.shape[1]
        for k in range(i * depth, (i + 1) * depth):
            if weights[k].ndim != 2 or weights[k].shape[1] != width:
                raise ValueError(f"decode: weights[{k}] must be [out, {width}]; got {list(weights[k].shape)}")
            width = weights[k].shape[0]
            if biases[k].shape != (width,):
                raise ValueError(f"decode: biases[{k}] must be [{width}]; got {list(biases[k].shape)}")
    _check_alike("decode", {"inputs": inputs, "weights": weights, "biases": biases}, dtype, device)


def check_add_weighted_gradients(
    totals: Sequence[Tensor], weights: Sequence[Tensor], x: Sequence[Tensor], delta: Sequence[Tensor]
) -> None:
    op = "add_weighted_gradients_"
    lengths = [len(each) for each in (totals, weights, x, delta)]
    if not totals or len(set(lengths)) > 1:
        raise ValueError(f"{op}: all lists must have the same length, at least 1; got {lengths}")
    dtype, device = x[0].dtype, x[0].device
    if dtype not in DTYPES:
        raise TypeError(f"{op}: x must be float32, float64 or bfloat16; got {dtype}")
    for i, (total, w, x_i, d) in enumerate(zip(totals, weights, x, delta, strict=True)):
        shapes = f"totals[{i}] {list(total.shape)}, weights {list(w.shape)}, x {list(x_i.shape)}, delta {list(d.shape)}"
        if w.ndim != 2 or x_i.ndim != 3 or d.ndim != 3 or not w.shape[1] == len(x_i) == len(d):
            raise ValueError(f"{op}: weights [V, P], x [P, N, d_in] and delta [P, N, d_out] are needed; got {shapes}")
        if x_i.shape[1] != d.shape[1] or total.shape != (len(w), d.shape[2], x_i.shape[2]):
            raise ValueError(f"{op}: x and delta must share N, and totals be [V, d_out, d_in]; got {shapes}")
        if not total.is_contiguous():
            raise ValueError(f"{op}: totals[{i}] must be contiguous")
    _check_alike(op, {"x": x, "delta": delta}, dtype, device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    _check_alike(op, {"totals": totals, "weights": weights}, wide, device)


def _check_alike(op: str, lists: dict[str, Sequence[Tensor]], dtype: torch.dtype, device: torch.device) -> None:
    for name, tensors in lists.items():
        for i, tensor in enumerate(tensors):
            if tensor.dtype != dtype:
                raise TypeError(f"{op}: {name}[{i}] must be {dtype}; got {tensor.dtype}")
            if tensor.device != device:
                raise ValueError(
                    f"{op}: all tensors must be on one device, {device}; {name}[{i}] is on {tensor.device}"
                )


def check_matching_loss(candidate: Sequence[Tensor], observed: Sequence[Tensor], images: Tensor | None) -> None:
    if not candidate or len(candidate) != len(observed):
        raise ValueError(
            "matching_loss: candidate and observed must be lists of the same length, at least 1; "
            f"got {len(candidate)} and {len(observed)}"
        )
    first = candidate[0]
    trials, dtype, device = first.shape[:1], first.dtype, first.device
    if dtype not in DTYPES:
        raise TypeError(f"matching_loss: candidate must be float32, float64 or bfloat16; got {dtype}")
    for i, (c, o) in enumerate(zip(candidate, observed, strict=True)):
        c_shape, o_shape = c.shape, o.shape
        if (c_shape != o_shape and (c_shape[1:] != o_shape[1:] or o_shape[:1] != (1,))) or c_shape[:1] != trials:
            raise ValueError(
                "matching_loss: candidate must be tensors [T, ...] and observed of the same shapes or [1, ...]; "
                f"tensor {i} is {list(c_shape)} against {list(o_shape)}, T = {list(trials)}"
            )
        if c.dtype != dtype or o.dtype != dtype:
            raise TypeError(
                f"matching_loss: candidate and observed must share one dtype; tensor {i} is {c.dtype} against {o.dtype}"
            )
        if c.device != device or o.device != device:
            raise ValueError(f"matching_loss: all tensors must be on one device; tensor {i} is not on {device}")
    if not trials:
        raise ValueError("matching_loss: candidate must be tensors [T, ...]; the first has no dimension")
    if images is not None:
        if images.dim() != 4 or images.shape[:1] != trials:
            raise ValueError(f"matching_loss: images must be [{trials[0]}, c, h, w]; got {list(images.shape)}")
        if images.dtype not in DTYPES:
            raise TypeError(f"matching_loss: images must be float32, float64 or bfloat16; got {images.dtype}")
        if images.device != device:
            raise ValueError(f"matching_loss: all tensors must be on one device; images are not on {device}")


def check_signed_adam_step(image: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
    shape, dtype = image.shape, image.dtype
    if gradient.shape != shape or exp_avg.shape != shape or exp_avg_sq.shape != shape:
        raise ValueError(
            "signed_adam_step_: gradient, exp_avg and exp_avg_sq must have image's shape "
            f"{list(shape)}; got {list(gradient.shape)}, {list(exp_avg.shape)}, {list(exp_avg_sq.shape)}"
        )
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"signed_adam_step_: image must be float32 or float64; got {dtype}")
    if gradient.dtype != dtype or exp_avg.dtype != dtype or exp_avg_sq.dtype != dtype:
        raise TypeError(
            f"signed_adam_step_: gradient, exp_avg and exp_avg_sq must have image's dtype {dtype}; "
            f"got {gradient.dtype}, {exp_avg.dtype}, {exp_avg_sq.dtype}"
        )
    if not image.device == gradient.device == exp_avg.device == exp_avg_sq.device:
        raise ValueError("signed_adam_step_: image, gradient, exp_avg and exp_avg_sq must be on one device")
