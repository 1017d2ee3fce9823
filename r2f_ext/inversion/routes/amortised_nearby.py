"""Route `amortised_nearby`: a second amortised estimate, from the public images that are nearest to the first."""

from __future__ import annotations

from dataclasses import replace

from r2f_ext.inversion.counting import search_verdict
from r2f_ext.inversion.label_by_label import candidates_nearby, invert_nearby
from r2f_ext.inversion.route import Problem, Route, Verdict
from r2f_ext.progress import Advance
from r2f_ext.types import Reconstruction


class AmortisedNearby(Route):
    """See `invert_nearby`: many more images are compared with the first estimate than pairs are made of."""

    name = "amortised_nearby"
    title = "amortised, nearest images"
    threat_model = (
        "Whoever holds the adapter and the base, head included, can run it; public images like the "
        "private ones sharpen it."
    )
    reads = ("target", "a", "observed", "public")
    after = ("amortised_by_label",)
    by_default = False

    def verdict(self, problem: Problem) -> Verdict:
        description = "a statistical estimate from public images that are near an earlier estimate, not exact"
        return search_verdict(problem, self.name, description)

    def units(self, problem: Problem) -> int:
        """The candidates that are compared; pairs and fits follow them."""
        public, labels = problem.public, problem.found["amortised_by_label"].labels
        assert public is not None and labels is not None
        return candidates_nearby(public.images, labels, public.generated)

    def run(self, problem: Problem, advance: Advance) -> Reconstruction:
        public, first = problem.public, problem.found["amortised_by_label"]
        assert problem.target is not None and problem.a is not None and problem.observed is not None
        assert public is not None
        found = invert_nearby(
            problem.target,
            problem.a,
            public.images,
            problem.observed,
            first,
            public.generated,
            public.private,
            advance,
            public.precision,
            public.most,
        )
        return replace(found, route=self.name)
