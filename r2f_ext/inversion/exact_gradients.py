"""Exact batch-1 gradients of images: what the closed forms read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from r2f_ext.errors import R2FError
from r2f_ext.inversion.geometry import PATCH_WEIGHT, POSITIONS, QKV_WEIGHT
from r2f_ext.models.base import check_classifier
from r2f_ext.types import BaseModel

NEEDED = (PATCH_WEIGHT, POSITIONS, QKV_WEIGHT)


def exact_gradients(
    base: BaseModel, images: Tensor, labels: Tensor, names: Sequence[str] | None = None
) -> list[dict[str, Tensor]]:
    """Cross-entropy gradients of every image on its own, in the model's dtype, as a client computes them.

    Args:
        images: [n, c, h, w] in [0, 1]; labels: [n] int64.
        names: parameters to differentiate; None: those of `NEEDED` that the base has.

    Returns:
        n dicts, parameter name -> gradient of the parameter's shape. Which parameters require a gradient is
        the same afterwards as before.

    Raises:
        R2FError: the images do not fit the base, a label is out of range, or the base has no classifier or no such
            parameter.
    """
    if tuple(images.shape[1:]) != tuple(base.input_shape) or len(images) != len(labels):
        raise R2FError(
            f"images {tuple(images.shape)} with {len(labels)} labels do not fit the base's input {base.input_shape}."
        )
    check_classifier(base)
    parameters = dict(base.model.named_parameters())
    chosen_names = tuple(names) if names is not None else tuple(name for name in NEEDED if name in parameters)
    absent = [name for name in chosen_names if name not in parameters]
    if absent or not chosen_names:
        raise R2FError(f"base '{base.spec}' has no parameter {(absent or NEEDED)[0]}: its gradient cannot be taken.")
    wrong = labels[(labels < 0) | (labels >= base.num_classes)]
    if len(wrong) > 0:
        raise R2FError(f"label {int(wrong[0])} is out of range: the base has {base.num_classes} classes, from 0.")
    chosen = [parameters[name] for name in chosen_names]
    before = [parameter.requires_grad for parameter in chosen]
    images, labels = images.to(chosen[0]), labels.to(base.device)
    try:
        for parameter in chosen:
            parameter.requires_grad_(True)
        taken = [_one_gradient(base, chosen, image, label) for image, label in zip(images, labels, strict=True)]
        return [dict(zip(chosen_names, gradients, strict=True)) for gradients in taken]
    finally:
        for parameter, state in zip(chosen, before, strict=True):
            parameter.requires_grad_(state)


def _one_gradient(
    base: BaseModel, parameters: list[torch.nn.Parameter], image: Tensor, label: Tensor
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        loss = F.cross_entropy(base.model(base.normalize(image[None])), label[None])
        return torch.autograd.grad(loss, parameters)
