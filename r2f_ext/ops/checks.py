"""Checks of the operators' arguments, with detailed messages.

The references and shape inference call them first. The compiled kernels have terse checks in C++; when one of those
fails, the wrapper calls the check here for an error that names the argument.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def check_lora_grad(
    x: Sequence[Tensor], delta: Sequence[Tensor], A: Sequence[Tensor], B: Sequence[Tensor], scales: Sequence[float]
) -> None:
    lists = {"x": x, "delta": delta, "A": A, **({"B": B} if B else {})}
    for layer, given in enumerate(_layers("lora_grad", lists, scales)):
        wrong = _wrong_layer(given)
        if wrong is None and B:
            one = (given["delta"].shape[2], given["A"].shape[-2])
            if given["B"].shape not in (one, (given["x"].shape[0], *one)):
                wrong = "B must be [d_out, r] or [P, d_out, r]"
        if wrong is not None:
            raise _bad_shapes("lora_grad", layer, wrong, given)


def check_lora_grad_tangent(
    x: Sequence[Tensor],
    delta: Sequence[Tensor],
    dx: Sequence[Tensor],
    ddelta: Sequence[Tensor],
    A: Sequence[Tensor],
    scales: Sequence[float],
) -> None:
    lists = {"x": x, "delta": delta, "dx": dx, "ddelta": ddelta, "A": A}
    for layer, given in enumerate(_layers("lora_grad_tangent", lists, scales)):
        wrong = _wrong_layer(given)
        if wrong is None and given["dx"].shape[1:] != given["x"].shape:
            wrong = "dx must be [K, P, N, d_in]"
        if wrong is None and given["ddelta"].shape != (len(given["dx"]), *given["delta"].shape):
            wrong = "ddelta must be [K, P, N, d_out], with the K of dx"
        if wrong is not None:
            raise _bad_shapes("lora_grad_tangent", layer, wrong, given)


def _layers(op: str, lists: dict[str, Sequence[Tensor]], scales: Sequence[float]) -> list[dict[str, Tensor]]:
    """The tensors of each layer by name, once lengths, dtypes and devices are known to agree."""
    lengths = {**{name: len(tensors) for name, tensors in lists.items()}, "scales": len(scales)}
    if len(set(lengths.values())) != 1 or not lengths["scales"]:
        said = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"{op}: lists of one length, at least 1, are needed; got {said}")
    layers = [dict(zip(lists, tensors, strict=True)) for tensors in zip(*lists.values(), strict=True)]
    first = layers[0]["x"]
    for layer, given in enumerate(layers):
        if first.dtype not in DTYPES or any(t.dtype != first.dtype for t in given.values()):
            dtypes = ", ".join(f"{name} {str(t.dtype).removeprefix('torch.')}" for name, t in given.items())
            raise TypeError(
                f"{op}: all tensors must share one dtype of float32, float64, bfloat16; layer {layer} has {dtypes}"
            )
        if any(t.device != first.device for t in given.values()):
            devices = ", ".join(f"{name} {t.device}" for name, t in given.items())
            raise ValueError(f"{op}: all tensors must be on one device; layer {layer} has {devices}")
    return layers


def _wrong_layer(given: dict[str, Tensor]) -> str | None:
    """What is wrong with the shapes of a layer's x, delta and A; None if nothing is."""
    x, delta, A = given["x"], given["delta"], given["A"]
    if x.ndim != 3 or delta.ndim != 3 or x.shape[:2] != delta.shape[:2]:
        return "x must be [P, N, d_in] and delta [P, N, d_out] with the same P and N"
    if A.ndim not in (2, 3) or A.shape[-1] != x.shape[2] or A.shape[:-2] not in ((), (x.shape[0],)):
        return "A must be [r, d_in] or [P, r, d_in]"
    return None if A.shape[-2] >= 1 else "the rank must be at least 1"


def _bad_shapes(op: str, layer: int, wrong: str, given: dict[str, Tensor]) -> ValueError:
    shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in given.items())
    return ValueError(f"{op}: {wrong}; layer {layer} has {shapes}")


def check_perceptrons(inputs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    if not inputs or not weights or len(weights) % len(inputs) or len(biases) != len(weights):
        raise ValueError(
            "perceptrons: every decoder needs the same number of weights and as many biases, at least 1; got "
            f"{len(inputs)} inputs, {len(weights)} weights and {len(biases)} biases"
        )
    depth, dtype, device = len(weights) // len(inputs), inputs[0].dtype, inputs[0].device
    if dtype not in DTYPES:
        raise TypeError(f"perceptrons: inputs must be float32, float64 or bfloat16; got {dtype}")
    for i, z in enumerate(inputs):
        if z.ndim != 2:
            raise ValueError(f"perceptrons: inputs must be [b, n]; inputs[{i}] is {list(z.shape)}")
        width = z.shape[1]
        for k in range(i * depth, (i + 1) * depth):
            if weights[k].ndim != 2 or weights[k].shape[1] != width:
                raise ValueError(f"perceptrons: weights[{k}] must be [out, {width}]; got {list(weights[k].shape)}")
            width = weights[k].shape[0]
            if biases[k].shape != (width,):
                raise ValueError(f"perceptrons: biases[{k}] must be [{width}]; got {list(biases[k].shape)}")
    _check_alike("perceptrons", {"inputs": inputs, "weights": weights, "biases": biases}, dtype, device)


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
        if not total.is_contiguous() or total.is_neg():
            raise ValueError(f"{op}: totals[{i}] must be contiguous, and no view that negates lazily")
    _check_alike(op, {"x": x, "delta": delta}, dtype, device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    _check_alike(op, {"totals": totals, "weights": weights}, wide, device)


def _check_alike(op: str, lists: Mapping[str, Sequence[Tensor]], dtype: torch.dtype, device: torch.device) -> None:
    for name, tensors in lists.items():
        for i, tensor in enumerate(tensors):
            if tensor.dtype != dtype:
                raise TypeError(f"{op}: {name}[{i}] must be {dtype}; got {tensor.dtype}")
            if tensor.device != device:
                raise ValueError(
                    f"{op}: all tensors must be on one device, {device}; {name}[{i}] is on {tensor.device}"
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
    _check_alike("matching_loss", {"candidate": candidate, "observed": observed}, dtype, device)
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
    images: Tensor,
) -> None:
    op, count = "factored_matching_loss", len(x)
    if not x or len(delta) != count or len(observed) != count:
        raise ValueError(
            f"{op}: x, delta and observed must be lists of the same length, at least 1; "
            f"got {count}, {len(delta)} and {len(observed)}"
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
        if o_shape[1:] != (d_shape[2], x_shape[2]) or (o_shape[:1] != trials and o_shape[0] != 1):
            raise ValueError(
                f"{op}: observed must be tensors [T, d_out, d_in], or 1 for T; tensor {i} is {list(o_shape)}"
            )
    _check_alike(op, {"x": x, "delta": delta, "observed": observed}, dtype, device)
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
    others = {"gradient": [gradient], "exp_avg": [exp_avg], "exp_avg_sq": [exp_avg_sq]}
    _check_alike("signed_adam_step_", others, dtype, image.device)
