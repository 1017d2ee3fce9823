"""Route `patch_position`: closed form from the exact gradients of the patch and the position embedding."""

from __future__ import annotations

from r2f_ext.inversion.counting import where_gradients_are
from r2f_ext.inversion.patch_position import ROUTE, count_patch_position, invert_patch_position
from r2f_ext.inversion.reconstruction import stack_victims
from r2f_ext.inversion.route import Problem, Route, Verdict
from r2f_ext.progress import Advance
from r2f_ext.types import Reconstruction


class PatchPosition(Route):
    """See `inversion/patch_position.py`."""

    name = ROUTE
    title = "exact gradient: patch positions"
    threat_model = (
        "A server of federated learning that sees the exact gradients of one image, and knows the base, can run it."
    )
    reads = ("gradients",)

    def verdict(self, problem: Problem) -> Verdict:
        verdict = count_patch_position(problem.base, problem.batch, problem.shared)
        return where_gradients_are(problem, verdict)

    def run(self, problem: Problem, advance: Advance) -> Reconstruction:
        assert problem.gradients is not None
        return stack_victims((invert_patch_position(problem.base, one) for one in problem.gradients), advance)
