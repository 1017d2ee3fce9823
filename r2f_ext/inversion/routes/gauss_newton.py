"""Route `gauss_newton`: the exact image of a one-step, one-image adapter, by a dense search."""

from __future__ import annotations

from collections.abc import Collection
from math import prod

from r2f_ext.inversion.counting import doubt, search_verdict, several_steps
from r2f_ext.inversion.gauss_newton import ROUTE, gauss_newton
from r2f_ext.inversion.route import Problem, Route, Verdict
from r2f_ext.inversion.start import lacks_images, remarked, search_start
from r2f_ext.inversion.update_map import MAX_PIXELS, too_large
from r2f_ext.progress import Advance
from r2f_ext.types import Reconstruction


class GaussNewton(Route):
    """See `inversion/gauss_newton.py`; minutes per adapter of the embedded base on 2 cores."""

    name = ROUTE
    threat_model = (
        "Whoever receives the adapter of one plain SGD step on one image, a federated update, and knows "
        "base and head can run it."
    )
    reads = ("target", "a", "observed")
    after = ("amortised_nearby", "amortised_by_label", "amortised")
    by_default = False

    def verdict(self, problem: Problem) -> Verdict:
        pixels = prod(problem.base.input_shape)
        large = f"{too_large(pixels)}; gauss_newton_matrix_free takes more" if pixels > MAX_PIXELS else None
        description = "a search that ends exactly only from a start close enough"
        return search_verdict(problem, self.name, description, large or several_steps(problem))

    def lacking(self, problem: Problem, later: Collection[str] = ()) -> str | None:
        return super().lacking(problem, later) or lacks_images(problem, later)

    def run(self, problem: Problem, advance: Advance) -> Reconstruction:
        assert problem.target is not None and problem.a is not None and problem.observed is not None
        start = search_start(problem, self.after)
        found = gauss_newton(
            problem.target,
            problem.a,
            problem.observed,
            start.estimate,
            start.subspace,
            problem.gauss_newton,
            advance,
            doubt(problem),
            problem.saved,
        )
        return remarked(found, start.remark)
