"""The gradient that AdamW's first step shows (docs/methods.md, 4).

AdamW's first step is B_1 = -lr u with u = g / (|g| + eps): nearly the sign of g. In exact arithmetic g follows from u,
as eps u / (1 - |u|). Float32 computes and stores u to about 7e-8, so with eps = 1e-8 it determines g to a relative
error of about 7 |g|: 0.1 % for an entry of 1e-4, 7 % for 1e-2, nothing above 0.02. `first_adamw_step` recovers g in
this way, and the search runs on a plain step whose entries are weighted by their precision. The map x -> u itself
cannot be searched: its derivative, eps / (|g| + eps)^2, is zero to rounding nearly everywhere and huge at sign changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from r2f_ext.errors import R2FError
from r2f_ext.inversion.exactness import storage_precision
from r2f_ext.pairs import Training

EPS = 1e-8  # torch.optim.AdamW's default, which `Training` keeps
ROUNDINGS = 2.0  # largest error of the rate that is read from B, in units of the dtype's eps
KNOWN = 8.0  # least ratio of 1 - |u| to the spread of its errors: below, errors of g are large and not symmetric
SIZES = 10.0 ** -torch.arange(1.5, 5.5, 1e-4, dtype=torch.float64)  # of g, at which the errors of u are measured
PEAK = 2.5  # least ratio of a layer's largest gradient entry to the root mean square
# Weights reduce the errors of large entries to this share of a layer's typical entry: in a search, and at its end. The
# smaller share lets few, precise entries decide, and their equations are ill conditioned. Gradients computed in float32
# are themselves no more precise than it.
AIM, FINE_AIM = 1e-3, 1e-6


@dataclass(frozen=True)
class FirstAdamWStep:
    """The gradient recovered from AdamW's first step, for one victim.

    Attributes:
        gradient: name -> gradient at B [d_out, r]; zero where the sign alone is known.
        errors: name -> root mean square errors of its entries [d_out, r]; infinite where the sign alone is known.
    """

    gradient: dict[str, Tensor]
    errors: dict[str, Tensor]

    def weights(self, aim: float) -> dict[str, Tensor]:
        """name -> [d_out, r] in [0, 1]: 0 where the sign alone is known, elsewhere falling from 1 where the error of an
        entry passes `aim` of the layer's typical entry."""
        found = {}
        for name, gradient in self.gradient.items():
            typical = gradient[self.errors[name].isfinite()].square().mean().sqrt()
            found[name] = 1 / (1 + self.errors[name] / (aim * typical))
        return found

    def noise(self, weights: dict[str, Tensor]) -> float:
        """The residual that these errors leave at the victim's own image, by the weighted gradient."""
        squares = [
            (weights[name] * self.errors[name]).nan_to_num(0.0).square().sum() / (weights[name] * g).square().sum()
            for name, g in self.gradient.items()
        ]
        return float(torch.stack(squares).mean().sqrt())

    def drawn(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Gradients that could be the victim's, name -> [count, d_out, r]."""
        found = {}
        for name, gradient in self.gradient.items():
            draws = torch.randn(count, *gradient.shape, generator=generator, dtype=gradient.dtype).to(gradient.device)
            found[name] = gradient + draws * torch.where(self.errors[name].isfinite(), self.errors[name], 0.0)
        return found


def first_adamw_step(b: dict[str, Tensor], training: Training) -> FirstAdamWStep:
    """Recover the gradient from B after AdamW's first step from B = 0, from how far each entry is from +-lr.

    With u = -B / lr = g / (|g| + eps): g = eps u / (1 - |u|), known to (|g| + eps)^2 / eps times the error of u. That
    error, of AdamW's arithmetic and of storing B, has a mean, which is subtracted, and a spread; `_arithmetic` finds
    both. Entries whose 1 - |u| is less than KNOWN times the spread count as signs.

    The largest |B| equals the learning rate up to a relative difference of eps over the largest |g|.
    A rate that is too large, by a fraction c, gives all entries above eps / c the size eps / c, so that no entry stands
    out. A rate that is too large by less than eps over the largest |g| cannot be told from the right one: every rate
    from the largest |B| upwards fits some gradient.

    Args:
        b: name -> B [d_out, r], in the dtype that it was trained in.
        training: AdamW's first step; its learning rate to all digits.

    Returns:
        gradients and errors in float64.

    Raises:
        R2FError: another recipe; a B that was stored with less precision than float32; a learning rate that did not
            make this B (the sentence names the one that did); or a layer in which no size other than 0 is known.
    """
    if not reads_adamw(training):
        raise R2FError("only the first step of AdamW can be read: later ones mix several gradients.")
    if rough := [name for name, each in b.items() if storage_precision(each).bits < 32]:
        raise R2FError(f"B of {rough[0]} has half precision, which keeps only the signs of AdamW's first step.")
    rate = training.rates()[0]
    _check_rate(b, rate)
    gradient, errors = {}, {}
    for name, each in b.items():
        shift, spread = _arithmetic(rate, each.dtype)
        u = each.double().abs() / rate
        known = 1 - (u - shift) > KNOWN * spread
        if not (known & (u > 0)).any():
            raise R2FError(f"AdamW's first step keeps only the signs of {name}'s gradient, whose entries are large.")
        u = torch.where(known, u - shift, 0.0).clamp_min(0)
        size = EPS * u / (1 - u)
        gradient[name] = -size * each.sign()
        errors[name] = torch.where(known, (size + EPS).square() / EPS * spread, torch.inf)
    return FirstAdamWStep(gradient, errors)


def reads_adamw(training: Training) -> bool:
    """Whether the search reads the gradient from the recipe's only step, AdamW's first."""
    return training.optimizer == "adamw" and training.steps == 1


@cache
def _arithmetic(rate: float, dtype: torch.dtype) -> tuple[float, float]:
    """Mean and standard deviation of the errors of |B| / rate by torch's AdamW, for gradient entries of `SIZES`."""
    b = torch.zeros(len(SIZES), dtype=dtype, requires_grad=True)
    b.grad = SIZES.to(dtype)
    torch.optim.AdamW([b], lr=rate).step()  # weight decay changes nothing at B = 0
    exact = b.grad.double() / (b.grad.double() + EPS)
    errors = b.detach().double().abs() / rate - exact
    return float(errors.mean()), max(float(errors.std()), torch.finfo(dtype).eps / 4)


def _check_rate(b: dict[str, Tensor], rate: float) -> None:
    """Refuse a rate below the largest |B|, or above it where the gradient entries then read have no peak."""
    largest = max(b.values(), key=lambda each: float(each.abs().max()))
    rounding = ROUNDINGS * torch.finfo(largest.dtype).eps
    u = largest.double().abs() / rate
    peak = float(u.max())
    size = EPS * u / (1 - u).clamp_min(1e-300)
    reached = abs(peak - 1) <= rounding
    if not reached and (peak > 1 or float(size.max()) < PEAK * float(size.square().mean().sqrt())):
        raise R2FError(
            f"B's largest entry is {rate * peak:.9g}, which is the learning rate of AdamW's first step, and the recipe "
            f"says {rate:.9g}: pass the victim's own."
        )
