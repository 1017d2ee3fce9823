"""Route `adapter_rowspace`: closed form from the movement of A, or from B alone after one step."""

from __future__ import annotations

from dataclasses import replace

from r2f_ext.inversion.adapter_rowspace import ROUTE, count_adapter_rowspace, invert_adapter_rowspace
from r2f_ext.inversion.counting import doubt
from r2f_ext.inversion.geometry import FIRST_QKV
from r2f_ext.inversion.reconstruction import stack_victims
from r2f_ext.inversion.route import Certainty, Problem, Route, Verdict
from r2f_ext.models import InitialA, forgot_start
from r2f_ext.progress import Advance
from r2f_ext.types import Reconstruction

UNKNOWN_START = "A before the first step is unknown: no common seed draws it; pass --initial FOLDER or --a0-seed N"


class AdapterRowspace(Route):
    """See `inversion/adapter_rowspace.py`. A_0 is searched for only if the count allows the solve."""

    name = ROUTE
    threat_model = (
        "Whoever holds the adapter and knows the base and A before training can run it, if plain SGD "
        "trained on one image."
    )
    reads = ("adapters", "initial")

    def verdict(self, problem: Problem) -> Verdict:
        verdict = count_adapter_rowspace(problem.base, problem.target, problem.steps, problem.batch)
        if verdict.certainty is not Certainty.REFUSED and problem.adapters and _start(problem) is None:
            return replace(verdict, certainty=Certainty.REFUSED, why=f"Not run: {UNKNOWN_START}.")
        return verdict

    def run(self, problem: Problem, advance: Advance) -> Reconstruction:
        start = _start(problem)
        assert problem.adapters and problem.target is not None and start is not None
        a0 = [start.a or (one.start if problem.steps == 1 else None) for one in problem.adapters]
        victims = [replace(one, a0=a) for one, a in zip(problem.adapters, a0, strict=True)]
        found = stack_victims(
            (invert_adapter_rowspace(problem.target, one) for one in victims), advance, doubt(problem)
        )
        return replace(found, why=f"A0 from {start.source}; {found.why}")


def _start(problem: Problem) -> InitialA | None:
    """A_0 and its source. `a` is empty if A_0 is A itself (one step) or if weight decay has removed A_0 from A."""
    assert problem.adapters and problem.initial is not None
    if problem.steps == 1 and not problem.initial.named:
        return InitialA({}, "the adapter itself, as after one step", 1.0)
    found = problem.initial.found
    if found is None and all(forgot_start(one.a[FIRST_QKV]) for one in problem.adapters):
        return InitialA({}, "nowhere: weight decay has made A forget it", 0.0)
    return found
