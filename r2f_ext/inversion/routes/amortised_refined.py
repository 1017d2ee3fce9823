"""Route `amortised_refined`: gradient matching in LoRA space, from the amortised estimate."""

from __future__ import annotations

from dataclasses import replace

from r2f_ext.inversion.channels import without_foreign_colours
from r2f_ext.inversion.counting import search_verdict
from r2f_ext.inversion.matching import match
from r2f_ext.inversion.objectives import UpdateObjective
from r2f_ext.inversion.route import Problem, Route, Verdict
from r2f_ext.progress import Advance
from r2f_ext.types import Reconstruction


class AmortisedRefined(Route):
    """Images whose LoRA update is the observed one, searched for near the amortised estimate and with its labels."""

    name = "amortised_refined"
    title = "amortised, refined"
    threat_model = (
        "Whoever holds the adapter and the base, head included, can run it on an adapter of one plain "
        "SGD step, as in federated learning."
    )
    reads = ("target", "a", "observed")
    after = ("amortised",)

    def verdict(self, problem: Problem) -> Verdict:
        description = "a statistical estimate refined by a local search without a guarantee"
        return search_verdict(problem, self.name, description)

    def units(self, problem: Problem) -> int:
        return problem.refinement.steps

    def run(self, problem: Problem, advance: Advance) -> Reconstruction:
        start = problem.found["amortised"]
        assert problem.target is not None and problem.a is not None and problem.observed is not None
        assert start.labels is not None
        found = match(
            problem.target,
            UpdateObjective(problem.target, problem.a, problem.observed),
            start.images,
            start.labels,
            problem.refinement,
            self.name,
            "local search from the amortised estimate on the LoRA update itself",
            lambda: advance(1),
            prior=problem.prior,
        )
        if problem.proxies is None:
            return found
        images = without_foreign_colours(found.images, start.images, problem.proxies.images)
        return replace(found, images=images)
