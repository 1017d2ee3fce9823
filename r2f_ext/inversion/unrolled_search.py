"""Searches for the image of a victim that took several steps, or AdamW's first, by a known recipe from a known A_0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from r2f_ext.inversion.adamw_step import AIM, FINE_AIM, first_adamw_step, reads_adamw
from r2f_ext.inversion.exactness import DRAWS, Bound, arithmetic_errors, bound_error, in_float64, rounded
from r2f_ext.inversion.gauss_newton import finished, free_positions, search, task_of_one
from r2f_ext.inversion.newton import Search
from r2f_ext.inversion.task import GaussNewtonConfig
from r2f_ext.inversion.unrolled import UnrolledMap, movement_weights, side_by_side
from r2f_ext.inversion.update_map import Subspace
from r2f_ext.pairs import Training
from r2f_ext.types import Target

Factors = dict[str, Tensor]  # name -> A [r, d_in] or B [d_out, r] of one adapter


class UnrolledSearch:
    """Searches for victims of one recipe, and bounds on the errors of what they find.

    Args:
        target: base model and adapted layers.
        a0: name -> A before the first step [r, d_in].
        training: the victims' recipe, learning rate included.
        subspace: of one image.

    Raises:
        R2FError: see `UnrolledMap`.
    """

    def __init__(
        self, target: Target, a0: Factors, training: Training, subspace: Subspace, config: GaussNewtonConfig
    ) -> None:
        plain = Training(batch=training.batch, samples=training.samples)
        modelled, shape = plain if reads_adamw(training) else training, target.base.input_shape
        self.training, self.config = training, config
        self.updates = UnrolledMap(target, a0, shape, modelled, config.directions)
        self.precise = UnrolledMap(in_float64(target), a0, shape, modelled, config.directions)
        self.subspace = side_by_side(subspace, training.owned)
        self.positions = free_positions(self.updates, self.subspace)

    def find(self, a: Factors, b: Factors, start: Tensor, labels: Tensor, loo_errors: Tensor | None = None) -> Search:
        """Search from start [owned * c * h * w] in [0, 1] and labels [owned] for the images of an adapter.

        Args:
            loo_errors: see `search`.

        Raises:
            R2FError: see `seen_of`.
        """
        seen, fine = seen_of(self.updates, a, b, self.training), seen_of(self.precise, a, b, self.training, FINE_AIM)
        given = seen.updates, seen.values, start, labels, self.subspace
        found = search(*given, self.config, loo_errors, self.positions, seen.noise)
        end = task_of_one(fine.updates, fine.values, labels, self.subspace.double(), fine.noise)
        same = seen.noise == 0  # then both weigh the update alike
        return finished(end, found, None if same else task_of_one(*given[:2], labels, self.subspace, seen.noise))

    def bound(self, a: Factors, b: Factors, image: Tensor, label: Tensor) -> Bound:
        """Bound the error of the image [c * h * w] found for an adapter, from what its factors leave unknown."""
        rough, fine = (seen_of(each, a, b, self.training, FINE_AIM) for each in (self.updates, self.precise))
        errors = fine.draws(DRAWS, torch.Generator().manual_seed(0)) - fine.values
        errors += arithmetic_errors(rough.updates, fine.updates, image, label)
        return bound_error(fine.updates, fine.values, errors, image, label, rough.updates)


@dataclass(frozen=True)
class Seen:
    """What one adapter shows of its training.

    Attributes:
        updates: the map with weights for the precision of this adapter's factors.
        values: [R], the value of the map that the adapter shows.
        noise: residual that errors of a gradient that was read leave at the victim's images; 0 where none was read.
        draws: (count, generator) -> values [count, R] float64 that the victim could have had for these factors.
    """

    updates: UnrolledMap
    values: Tensor
    noise: float
    draws: Callable[[int, torch.Generator], Tensor]


def seen_of(unrolled: UnrolledMap, a: Factors, b: Factors, training: Training, aim: float = AIM) -> Seen:
    """What an adapter of factors a[name] [r, d_in], b[name] [d_out, r] shows to the map of its modelled training.

    Args:
        unrolled: the map of `training`, or of one plain step where `reads_adamw`.
        aim: see `FirstAdamWStep.weights`.

    Raises:
        R2FError: see `first_adamw_step` and `UnrolledMap.observation`.
    """
    dtype = next(iter(unrolled.a0.values())).dtype
    if reads_adamw(training):
        step = first_adamw_step(b, training)
        weights = step.weights(aim)
        weighed = unrolled.weighing({name: each.to(dtype) for name, each in weights.items()})

        def read(count: int, generator: torch.Generator) -> Tensor:
            return weighed.observation({}, {name: -each for name, each in step.drawn(count, generator).items()})

        values = weighed.observation({}, {name: -each[None] for name, each in step.gradient.items()})
        return Seen(weighed, values[0].to(dtype), step.noise(weights), read)
    weighed = unrolled.weighing(a_weights=movement_weights(unrolled.a0, a))

    def stored(count: int, generator: torch.Generator) -> Tensor:
        draws = (
            {name: torch.stack([rounded(each, generator) for _ in range(count)]) for name, each in factors.items()}
            for factors in (a, b)
        )
        return weighed.observation(*draws)

    shown = ({name: each[None].to(dtype) for name, each in factors.items()} for factors in (a, b))
    return Seen(weighed, weighed.observation(*shown)[0], 0.0, stored)
