"""Where a Gauss-Newton search starts, and in which space it moves."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from r2f_ext.inversion.channels import GRAY, NEARLY_GRAY, colour_of
from r2f_ext.inversion.route import Problem
from r2f_ext.inversion.update_map import SUBSPACE_IMAGES, Subspace, onto_span
from r2f_ext.types import Reconstruction

ONLY_GRAY = "The estimates look gray, so the search is among gray images only: it cannot find one in colour."
MIN_GRAY = 1000  # gray images; fewer do not span what images vary along


@dataclass(frozen=True)
class Start:
    """Where V searches begin and move.

    Attributes:
        estimate: the images that they start from, in the affine span of public images but for clamping to [0, 1].
        subspace: of that span.
        remark: what a user is to know of it, as a sentence; empty: nothing.
    """

    estimate: Reconstruction
    subspace: Subspace
    remark: str = ""


def lacks_images(problem: Problem, later: Collection[str] = ()) -> str | None:
    """The field of `Problem` that is missing for a search subspace (`proxies`); None if the subspace can be built.

    Args:
        later: see `Route.lacking`.
    """
    return "proxies" if problem.public is None and problem.proxies is None and "proxies" not in later else None


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
        order = torch.randperm(len(problem.public.images), generator=torch.Generator().manual_seed(0))
        images = problem.public.images.batch(order[:SUBSPACE_IMAGES], estimate.images.device).to(estimate.images)
    else:
        assert problem.proxies is not None
        images = problem.proxies.images
    return start_among(images, estimate)


def start_among(images: Tensor, estimate: Reconstruction) -> Start:
    """The estimate, moved to the nearest point of the span of public images [n, c, h, w], see `spanning`.

    Raises:
        R2FError: see `Subspace.of`.
    """
    chosen = spanning(images, estimate.images)
    subspace = Subspace.of(chosen)
    moved = onto_span(estimate.images.flatten(1), chosen.flatten(1).mean(0), subspace.basis)
    remark = "" if chosen is images else ONLY_GRAY
    return Start(replace(estimate, images=moved.clamp(0, 1).view_as(estimate.images)), subspace, remark)


def spanning(images: Tensor, estimates: Tensor) -> Tensor:
    """The public images [n, c, h, w] whose span a search moves in: the gray ones alone, if all estimates look gray.

    The update of a gray image shows that it is gray, so the estimates [V, c, h, w] are. Directions of colour would make
    a search slower and harder: generated images span 2,570 directions, the gray ones among them 1,024.
    """
    if not bool((colour_of(estimates) < NEARLY_GRAY).all()):
        return images
    gray = colour_of(images) < GRAY
    return images[gray] if MIN_GRAY <= int(gray.sum()) < len(images) else images


def remarked(found: Reconstruction, remark: str) -> Reconstruction:
    """The result of a search with the remark on its start."""
    return replace(found, why=f"{found.why}. {remark}") if remark else found


def best_estimate(problem: Problem, routes: Sequence[str]) -> Reconstruction:
    """Among the estimates that these routes found, the second one, or else that from most pairs of a victim's label."""
    found = [problem.found[name] for name in routes if name in problem.found]
    return max(found, key=lambda each: ("near_pairs" in each.details, each.details.get("pairs_a_victim", 0.0)))
