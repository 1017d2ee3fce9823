"""What a classifier saved with an adapter tells: the label, and the input of the last layer.

Cross-entropy's gradient at the logits is p - y, so the last layer's is G = sum_n (p_n - y_n) z_n^T, and its bias's
g = sum_n (p_n - y_n). For one image only the row of its class points against all others (Zhao et al. 2020, iDLG), and
z = G[c] / g[c] for every class c. For several images g[c] < 0 shows that class c is among them, because p > 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Paths of the last linear layer, as timm (`default_cfg["classifier"]`) and transformers name it in their classifiers.
HEADS = (
    "head",
    "head.fc",
    "head.linear",
    "head_dist",
    "head_dist.linear",
    "fc",
    "last_linear",
    "classifier",
    "classifier.1",
    "cls_classifier",
    "distillation_classifier",
)
WRAPPED = "timm_model."  # before timm's paths in a timm model that transformers wraps
ONE_IMAGE = 1e-3  # largest share of one image's head gradient that is not a multiple of one row
CONSTANT = 0.9  # 10th over 90th percentile of |G| above which a step held only signs, as Adam's first step does
LISTED = 5  # classes in a sentence
SAMPLE = 1 << 20  # entries that percentiles are taken of
PLAIN = "with plain cross-entropy and no weight decay"


@dataclass(frozen=True)
class HeadLeak:
    """The images' class where the head tells it, and the sentences on what it tells."""

    label: int | None = None
    leaks: tuple[str, ...] = ()


def is_head(module: str) -> bool:
    """Whether a module of this path in a base is its last linear layer, which reads one feature vector an image."""
    return module.removeprefix(WRAPPED) in HEADS


def head_leak(weight: Tensor, bias: Tensor | None, precision: float) -> HeadLeak:
    """Read a head whose start is known.

    Args:
        weight: start - end of its weight [classes, d], float64: a positive multiple of G after one step of plain SGD.
        bias: start - end of its bias [classes], or None.
        precision: the relative error of both that storage causes; smaller entries are not read.
    """
    bias = None if bias is None or not bias.any() else bias
    row = weight[weight.norm(dim=1).argmax()]
    factors = weight @ row / row.square().sum()  # of every row, if the rows are multiples of one
    one_image = bool((weight - factors[:, None] * row).norm() <= ONE_IMAGE * weight.norm())
    falling = [] if bias is None else _negative(bias, precision)
    label = falling[0] if len(falling) == 1 else None
    if one_image and bias is None:
        label = _against_all_others(factors, precision)
    if one_image and label is not None:
        return HeadLeak(label, (_one_image(weight, bias, label),))
    if not falling:
        return HeadLeak(None, ("The head in the file was trained; its change tells no label for certain.",))
    return HeadLeak(label, (_present(falling, len(weight)),))


def new_head_leak(bias: Tensor) -> tuple[str, ...]:
    """Read a head [classes] whose start is unknown, from the bias alone."""
    rose = torch.nonzero(bias > 0).flatten().tolist()
    if not rose or not (bias < 0).any():
        return ()
    return (
        "If the bias of the head in the file began at zero, as transformers makes new heads, images of "
        f"{_classes(rose, len(bias))} were trained on, with plain cross-entropy.",
    )


def _one_image(weight: Tensor, bias: Tensor | None, label: int) -> str:
    said = (
        f"The head in the file gives away the label, {label}: its row moved against all others, as {PLAIN} it does on "
        "one image, or on images of one class with equal features (Zhao et al. 2020)"
    )
    size = f"the {weight.shape[1]} inputs of the last layer"
    sizes = weight.abs().flatten()
    sizes = sizes[:: 1 + len(sizes) // SAMPLE]
    low, high = sizes.quantile(0.1), sizes.quantile(0.9)
    if bool(low > CONSTANT * high):
        return f"{said}; the rows hold the signs of {size}, as after the first step of Adam."
    if bias is None:
        return f"{said}; the rows are multiples of {size}."
    features = weight[label] / bias[label]
    error = float((weight - bias[:, None] * features).norm() / weight.norm())
    return f"{said}; divided by the change of its bias it is {size} (rows agree to {error:.0e})."


def _present(labels: list[int], classes: int) -> str:
    which = _classes(labels, classes)
    return f"The bias of the head in the file rose for {which}: {PLAIN}, images of them were trained on."


def _negative(bias: Tensor, precision: float) -> list[int]:
    """Classes whose gradient is below zero by more than its error."""
    return torch.nonzero(bias < -10 * precision * bias.abs().max()).flatten().tolist()


def _against_all_others(rows: Tensor, precision: float) -> int | None:
    """The one row of a rank-1 gradient whose factor has another sign than all others'; None where it is not certain."""
    floor = 10 * precision * rows.abs().max()
    for sign in (1, -1):
        apart, others = sign * rows > floor, -sign * rows > floor
        if int(apart.sum()) == 1 and int(others.sum()) > 1:
            return int(apart.int().argmax())
    return None


def _classes(labels: list[int], classes: int) -> str:
    if len(labels) == 1:
        return f"class {labels[0]}"
    if len(labels) > LISTED:
        return f"{len(labels)} of the {classes} classes ({', '.join(map(str, labels[:LISTED]))}, ...)"
    return f"the classes {', '.join(map(str, labels[:-1]))} and {labels[-1]}"
