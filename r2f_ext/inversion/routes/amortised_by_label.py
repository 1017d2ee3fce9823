"""Route `amortised_by_label`: the amortised estimate from every public image of the victim's label."""

from __future__ import annotations

from dataclasses import replace

from r2f_ext.inversion.counting import search_verdict
from r2f_ext.inversion.label_by_label import invert_by_label, pairs_by_label
from r2f_ext.inversion.route import Problem, Route, Verdict
from r2f_ext.progress import Advance
from r2f_ext.types import Reconstruction


class AmortisedByLabel(Route):
    """See `inversion/label_by_label.py`; pairs are made and held in memory for one label at a time."""

    name = "amortised_by_label"
    title = "amortised, label by label"
    threat_model = (
        "Whoever holds the adapter and the base, head included, can run it; public images like the "
        "private ones sharpen it."
    )
    reads = ("target", "a", "observed", "public")
    after = ("amortised",)
    by_default = False

    def verdict(self, problem: Problem) -> Verdict:
        description = "a statistical estimate from all public images of the label that amortised finds, not exact"
        return search_verdict(problem, self.name, description)

    def units(self, problem: Problem) -> int:
        public, labels = problem.public, problem.found["amortised"].labels
        assert public is not None and labels is not None
        return pairs_by_label(public.images, labels, public.most)

    def run(self, problem: Problem, advance: Advance) -> Reconstruction:
        public, labels = problem.public, problem.found["amortised"].labels
        assert problem.target is not None and problem.a is not None and problem.observed is not None
        assert public is not None and labels is not None
        found = invert_by_label(
            problem.target, problem.a, public.images, problem.observed, advance, public.precision, labels, public.most
        )
        return replace(found.reconstruction, route=self.name)
