"""Route `matching`: from gray towards the decoded gradient, with the amortised route's labels."""

from dataclasses import replace

import torch
from route_cases import posed

from r2f_ext.capture import Capture
from r2f_ext.inversion.matching import MatchingConfig
from r2f_ext.inversion.routes.amortised import Amortised
from r2f_ext.inversion.routes.matching import Matching
from r2f_ext.types import Gradient


def test_the_distance_to_the_decoded_gradient_falls() -> None:
    problem, images = posed()
    assert problem.target is not None
    labels = torch.tensor([2, 2])
    with Capture(problem.target) as capture:
        true = capture(images[:, None], labels[:, None])
    decoded = Gradient({name: true.dense(name) for name in problem.target.names})
    start = Amortised().run(problem, lambda units: None)
    problem = replace(
        problem,
        decoded=decoded,
        found={"amortised": start},
        matching=MatchingConfig(steps=30, step_size=0.003, tv_weight=0.0),
    )
    found = Matching().run(problem, lambda units: None)

    def mismatch(candidates: torch.Tensor) -> float:
        with Capture(problem.target) as capture:
            gradient = capture(candidates.double()[:, None], labels[:, None])
        cosines = [
            torch.cosine_similarity(gradient.dense(name).flatten(1), decoded.dense[name].flatten(1))
            for name in decoded.dense
        ]
        return float(1 - torch.stack(cosines).mean())

    assert found.labels is not None and torch.equal(found.labels, labels)
    assert mismatch(found.images) < 0.5 * mismatch(torch.full_like(images, 0.5))
