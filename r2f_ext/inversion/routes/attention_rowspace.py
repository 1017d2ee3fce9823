"""Route `attention_rowspace`: closed form from the row space of the exact gradient of block 0's qkv."""

from __future__ import annotations

from r2f_ext.inversion.attention_rowspace import ROUTE, count_attention_rowspace, invert_attention_rowspace
from r2f_ext.inversion.counting import where_gradients_are
from r2f_ext.inversion.reconstruction import stack_victims
from r2f_ext.inversion.route import Problem, Route, Verdict
from r2f_ext.progress import Advance
from r2f_ext.types import Reconstruction


class AttentionRowspace(Route):
    """See `inversion/attention_rowspace.py`."""

    name = ROUTE
    title = "exact gradient: row space of attention"
    threat_model = (
        "A server of federated learning that sees the exact gradient of one image, and knows the base, can run it."
    )
    reads = ("gradients",)

    def verdict(self, problem: Problem) -> Verdict:
        verdict = count_attention_rowspace(problem.base, problem.batch, problem.shared)
        return where_gradients_are(problem, verdict)

    def run(self, problem: Problem, advance: Advance) -> Reconstruction:
        assert problem.gradients is not None
        return stack_victims((invert_attention_rowspace(problem.base, one) for one in problem.gradients), advance)
