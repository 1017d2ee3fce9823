"""Labels from the gradient of the classifier's last layer.

With p the model's probabilities and y the one-hot labels, the cross-entropy's gradient at the logits is p - y: for one
image only the true class is below zero (Zhao et al. 2020, iDLG), and for b images the bias's gradient is the mean of
p minus each class's share of the labels (Wainakh et al. 2021).
"""

from __future__ import annotations

import torch
from torch import Tensor

from r2f_ext.errors import R2FError

NEARLY_WHOLE = 0.25  # farthest that a count may lie from a whole number


def recover_labels(
    weight: Tensor | None, bias: Tensor | None = None, batch: int = 1, probabilities: Tensor | None = None
) -> Tensor:
    """Labels [V, batch] of V victims, in ascending order.

    Args:
        weight: gradient of the last layer's weight [V, classes, d], enough for one image; None if the bias is there.
        bias: gradient of its bias [V, classes]. For one image both may have any positive scale; for more the bias must
            be the exact gradient, averaged over the images.
        batch: images of a group, b.
        probabilities: the model's mean output [classes] on images like these, a guess of p; None: 1 / classes each,
            which is right for a fresh head. The counts are b (p - gradient).

    Raises:
        R2FError: no gradient, not finite, zero, of wrong shape; for b > 1, no bias, or counts that are not near whole
            numbers that sum to b, so that the guess of p is not good enough.
    """
    given = [g for g in (weight, bias) if g is not None]
    if not given:
        raise R2FError("labels need the gradient of the last layer's weight or bias, and neither is there.")
    for gradient, ndim in ((weight, 3), (bias, 2)):
        if gradient is not None and gradient.ndim != ndim:
            raise R2FError(
                f"the last layer's gradient is {list(gradient.shape)}: give [victims, classes, d] or its bias's."
            )
        if gradient is not None and not torch.isfinite(gradient).all():
            raise R2FError("the last layer's gradient is not finite: it holds NaN or infinity.")
        if gradient is not None and bool((gradient.flatten(1) == 0).all(1).any()):
            raise R2FError(
                "the last layer's gradient is zero: the model has converged on the data, which hides the labels."
            )
    if batch < 1:
        raise R2FError(f"a group has at least one image, not {batch}.")
    if batch > 1:
        if bias is None:
            raise R2FError(f"the labels of {batch} images need the gradient of the last layer's bias.")
        return torch.stack([_counted(one, batch, probabilities) for one in bias.double().cpu()]).to(bias.device)
    if bias is not None:
        return bias.argmin(1, keepdim=True)
    assert weight is not None
    rows = weight.double()
    # Row c is (p_c - y_c) h: the true class's row points against the sum of all other rows, whatever h is.
    against = (rows * (rows.sum(1, keepdim=True) - rows)).sum(-1)
    return against.argmin(1, keepdim=True)


def _counted(gradient: Tensor, batch: int, probabilities: Tensor | None) -> Tensor:
    """Labels [batch] from the bias's gradient [classes], where the guess of p gives nearly whole counts."""
    classes = len(gradient)
    p = torch.full_like(gradient, 1 / classes) if probabilities is None else probabilities.to(gradient)
    if p.shape != gradient.shape:
        raise R2FError(f"probabilities are {list(p.shape)} for {classes} classes.")
    expected = batch * (p - gradient)
    counts = expected.round()
    distance = (expected - counts).abs()
    if float(distance.max()) > NEARLY_WHOLE or float(counts.min()) < 0 or int(counts.sum()) != batch:
        worst = int(distance.argmax())
        times = f"{float(expected[worst]):.2f} times"
        raise R2FError(
            f"the labels of {batch} images cannot be counted: class {worst} would be there {times} by these "
            "probabilities; pass the model's mean output on images like these."
        )
    return torch.repeat_interleave(torch.arange(classes), counts.long())
