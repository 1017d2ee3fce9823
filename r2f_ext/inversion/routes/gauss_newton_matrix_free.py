"""Route `gauss_newton_matrix_free`: the search of `gauss_newton` without a Jacobian, for images of any size."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from r2f_ext.inversion.counting import doubt, search_verdict, several_steps
from r2f_ext.inversion.exactness import Bound
from r2f_ext.inversion.gauss_newton import UpdateBound, moved_layers
from r2f_ext.inversion.matrix_free import (
    Coordinates,
    ProxyCoordinates,
    SpectrumCoordinates,
    search_matrix_free,
)
from r2f_ext.inversion.newton import Search
from r2f_ext.inversion.route import Problem, Verdict
from r2f_ext.inversion.routes.gauss_newton import GaussNewton
from r2f_ext.inversion.saved_searches import by_victim, files_of
from r2f_ext.inversion.searches import one_by_one, search_each
from r2f_ext.inversion.start import best_estimate, remarked, search_start
from r2f_ext.inversion.update_map import MAX_PIXELS, UpdateMap, flat_units
from r2f_ext.progress import Advance
from r2f_ext.types import Reconstruction


class GaussNewtonMatrixFree(GaussNewton):
    """See `inversion/matrix_free.py`: hundreds of passes through the model at each of up to 14 points."""

    name = "gauss_newton_matrix_free"

    def verdict(self, problem: Problem) -> Verdict:
        description = "a search that ends exactly only from a start closer than that of gauss_newton"
        return search_verdict(problem, self.name, description, several_steps(problem))

    def run(self, problem: Problem, advance: Advance) -> Reconstruction:
        assert problem.target is not None and problem.a is not None and problem.observed is not None
        observed, config, shape = problem.observed, problem.matrix_free, problem.base.input_shape
        target = moved_layers(problem.target, observed)
        updates = UpdateMap(target, problem.a, torch.Size(shape), problem.gauss_newton.directions)
        targets = flat_units({name: observed[name] for name in target.names})
        start, coordinates, remark = _start(problem, self.after)
        bound = UpdateBound(updates, observed) if prod(shape) <= MAX_PIXELS else _unknown

        def find(victim: int, image: Tensor, label: Tensor) -> Search:
            return search_matrix_free(updates, targets[victim], image, label, coordinates, config)

        files = files_of(problem.saved, self.name, config, target, problem.a, by_victim(observed), start.labels)
        found = search_each(self.name, start, one_by_one(find), bound, advance, doubt(problem), files)
        return remarked(found, remark)


def _unknown(victim: int, image: Tensor, label: Tensor) -> Bound:
    """The spectrum of a Jacobian in all pixels of a large image is not computed, so nothing is said of exactness."""
    return Bound()


def _start(problem: Problem, routes: Sequence[str]) -> tuple[Reconstruction, Coordinates, str]:
    """The start, coordinates, and a remark on both (see `Start`). The coordinates are from the variation of public
    images if its basis fits into memory, otherwise from the mean spectrum of natural images."""
    shape = problem.base.input_shape
    if prod(shape) > MAX_PIXELS:
        return best_estimate(problem, routes), SpectrumCoordinates(shape), ""
    start = search_start(problem, routes)
    return start.estimate, ProxyCoordinates(start.subspace), start.remark
