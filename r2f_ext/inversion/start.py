"""Where a Gauss-Newton search starts, and in which space it moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from r2f_ext.inversion.route import Problem
from r2f_ext.inversion.update_map import SUBSPACE_IMAGES, Subspace, onto_span
from r2f_ext.types import Reconstruction


@dataclass(frozen=True)
class Start:
    """The images that V searches start from, in the affine span of public images, and the subspace of that span."""

    estimate: Reconstruction
    subspace: Subspace


def search_start(problem: Problem, routes: Sequence[str]) -> Start:
    """The best estimate found so far, moved to the nearest point of the span of the public images or proxies.

    A search only adds combinations of the subspace's directions to its start. Without the move, any component of the
    start outside the span would remain, and the search could not end at an image of the span.

    Args:
        routes: whose estimates may serve; see `best_estimate`.

    Raises:
        R2FError: see `Subspace.of`.
    """
    estimate = best_estimate(problem, routes)
    if problem.public is not None:
        chosen = torch.randperm(len(problem.public.images), generator=torch.Generator().manual_seed(0))
        images = problem.public.images.batch(chosen[:SUBSPACE_IMAGES], estimate.images.device).to(estimate.images)
    else:
        assert problem.proxies is not None
        images = problem.proxies.images
    subspace = Subspace.of(images)
    moved = onto_span(estimate.images.flatten(1), images.flatten(1).mean(0), subspace.basis)
    return Start(replace(estimate, images=moved.clamp(0, 1).view_as(estimate.images)), subspace)


def best_estimate(problem: Problem, routes: Sequence[str]) -> Reconstruction:
    """Among the estimates that these routes found, the one from most pairs of a victim's label."""
    found = [problem.found[name] for name in routes if name in problem.found]
    return max(found, key=lambda each: each.details.get("pairs_a_victim", 0.0))
