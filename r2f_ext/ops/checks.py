"""What the arguments of the operators must be.

The compiled kernels check for themselves, in C++; the reference and shape inference check here, and when a kernel
refuses its arguments this says why.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
ACTIVATIONS = ("gelu", "relu", "identity")


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


def check_decode(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bases: Sequence[Tensor],
    activation: str,
) -> None:
    """Of L layers, one after another: weights and biases have the same number of maps for each."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"decode: activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    dtype, device = inputs[0].dtype, inputs[0].device
    if dtype not in DTYPES:
        raise TypeError(f"decode: inputs must be float32, float64 or bfloat16; got {dtype}")
    maps, batch = len(weights) // len(inputs), inputs[0].shape[:1]
    for layer, z in enumerate(inputs):
        if z.ndim != 2 or z.shape[:1] != batch:
            raise ValueError(f"decode: inputs must be [b, n] with one b; layer {layer} has {list(z.shape)}")
        width, tensors = z.shape[1], [z]
        for j in range(maps):
            weight = weights[layer * maps + j]
            if weight.ndim != 2 or weight.shape[1] != width:
                raise ValueError(f"decode: weights[{j}][{layer}] must be [out, {width}]; got {list(weight.shape)}")
            width = weight.shape[0]
            tensors.append(weight)
            if biases:
                bias = biases[layer * maps + j]
                if bias.shape != (width,):
                    raise ValueError(f"decode: biases[{j}][{layer}] must be [{width}]; got {list(bias.shape)}")
                tensors.append(bias)
        if bases:
            basis = bases[layer]
            if basis.ndim != 2 or basis.shape[0] != width:
                raise ValueError(f"decode: bases[{layer}] must be [{width}, m]; got {list(basis.shape)}")
            tensors.append(basis)
        _check_alike(layer, tensors, dtype, device)


def _check_alike(layer: int, tensors: list[Tensor], dtype: torch.dtype, device: torch.device) -> None:
    for tensor in tensors:
        if tensor.dtype != dtype:
            raise TypeError(f"decode: all tensors must share one dtype; layer {layer} has {tensor.dtype}, not {dtype}")
        if tensor.device != device:
            raise ValueError(
                f"decode: all tensors must be on one device; layer {layer} has {tensor.device}, not {device}"
            )


def check_matching_loss(candidate: Sequence[Tensor], observed: Sequence[Tensor], images: Tensor) -> None:
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
    _check_images("matching_loss", images, trials[0], device)


def _check_images(op: str, images: Tensor, trials: int, device: torch.device) -> None:
    if images.dim() != 4 or images.shape[0] != trials:
        raise ValueError(f"{op}: images must be [{trials}, c, h, w]; got {list(images.shape)}")
    if images.dtype not in DTYPES:
        raise TypeError(f"{op}: images must be float32, float64 or bfloat16; got {images.dtype}")
    if images.device != device:
        raise ValueError(f"{op}: all tensors must be on one device; images are not on {device}")


def check_factored_matching_loss(
    x: Sequence[Tensor],
    delta: Sequence[Tensor],
    observed: Sequence[Tensor],
    observed_delta: Sequence[Tensor],
    images: Tensor,
) -> None:
    op, count = "factored_matching_loss", len(x)
    if not x or len(delta) != count or len(observed) != count or len(observed_delta) not in (0, count):
        raise ValueError(
            f"{op}: x, delta, observed and observed_delta must be lists of the same length, at least 1; "
            f"got {count}, {len(delta)}, {len(observed)} and {len(observed_delta)}"
        )
    dtype, device = x[0].dtype, x[0].device
    if dtype not in DTYPES:
        raise TypeError(f"{op}: x must be float32, float64 or bfloat16; got {dtype}")
    trials = x[0].shape[:1]
    for i in range(count):
        x_shape, d_shape, o_shape = x[i].shape, delta[i].shape, observed[i].shape
        if len(x_shape) != 3 or x_shape[:1] != trials or len(d_shape) != 3 or d_shape[:2] != x_shape[:2]:
            raise ValueError(
                f"{op}: x must be tensors [T, N, d_in] and delta [T, N, d_out]; "
                f"tensor {i} is {list(x_shape)} and {list(d_shape)}, T = {list(trials)}"
            )
        given = [x[i], delta[i], observed[i]]
        if not observed_delta:
            fits, words = o_shape[1:] == (d_shape[2], x_shape[2]), "observed must be tensors [T, d_out, d_in]"
        else:
            star = observed_delta[i]
            given.append(star)
            fits = len(o_shape) == 3 and o_shape[2] == x_shape[2] and star.shape == (*o_shape[:2], d_shape[2])
            words = "observed must be tensors [T, M, d_in] and observed_delta [T, M, d_out]"
        if not fits or (o_shape[:1] != trials and o_shape[0] != 1):
            raise ValueError(f"{op}: {words}, or 1 for T; tensor {i} is {list(o_shape)}")
        for tensor in given:
            if tensor.dtype != dtype:
                raise TypeError(
                    f"{op}: x, delta, observed and observed_delta must share one dtype; "
                    f"layer {i} has {tensor.dtype} and x {dtype}"
                )
            if tensor.device != device:
                raise ValueError(f"{op}: all tensors must be on one device; layer {i} is not on {device}")
    _check_images(op, images, trials[0], device)


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
