"""Route `amortised`: a statistical estimate from proxy pairs, by kernel ridge or a U-Net on top of it."""

from __future__ import annotations

from r2f_ext.inversion.counting import search_verdict
from r2f_ext.inversion.route import Problem, Route, Verdict
from r2f_ext.inversion.unet import UNetInverter
from r2f_ext.progress import Advance
from r2f_ext.types import Reconstruction


class Amortised(Route):
    """See `inversion/amortised.py` and, with `Problem.unet`, `inversion/unet.py`."""

    name = "amortised"
    threat_model = (
        "Whoever holds the adapter and the base, head included, can run it; public images like the "
        "private ones sharpen it."
    )
    reads = ("observed", "proxies")

    def verdict(self, problem: Problem) -> Verdict:
        return search_verdict(problem, self.name, "a statistical estimate, always available and not exact")

    def units(self, problem: Problem) -> int:
        return 1 if problem.unet is None else problem.unet.epochs

    def run(self, problem: Problem, advance: Advance) -> Reconstruction:
        assert problem.proxies is not None and problem.observed is not None
        if problem.unet is not None:
            return UNetInverter(problem.proxies.ridge, problem.unet, advance).invert(
                problem.observed, problem.known_labels
            )
        found = problem.proxies.ridge.invert(problem.observed, problem.known_labels)
        advance(1)
        return found
