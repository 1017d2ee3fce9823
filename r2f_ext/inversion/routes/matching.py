"""Route `matching`: gradient matching on the decoded gradient, from a gray image."""

from __future__ import annotations

import torch

from r2f_ext.inversion.counting import search_verdict
from r2f_ext.inversion.matching import match
from r2f_ext.inversion.objectives import GradientObjective
from r2f_ext.inversion.route import Problem, Route, Verdict
from r2f_ext.progress import Advance
from r2f_ext.types import Reconstruction


class Matching(Route):
    """Images whose full gradient is the decoded one, with the labels of the amortised route."""

    name = "matching"
    threat_model = (
        "Whoever holds the adapter of one step and the base, head included, can run it on the gradient "
        "that a decoder estimates."
    )
    reads = ("target", "decoded")
    after = ("amortised",)

    def verdict(self, problem: Problem) -> Verdict:
        return search_verdict(problem, self.name, "a local search without a guarantee")

    def units(self, problem: Problem) -> int:
        return problem.matching.steps

    def run(self, problem: Problem, advance: Advance) -> Reconstruction:
        start = problem.found["amortised"]
        assert problem.target is not None and problem.decoded is not None and start.labels is not None
        return match(
            problem.target,
            GradientObjective(problem.decoded),
            torch.full_like(start.images, 0.5),
            start.labels,
            problem.matching,
            self.name,
            "local search from gray on the decoded gradient; on ViTs it usually stalls below the mean image",
            lambda: advance(1),
            prior=problem.prior,
        )
