"""Where a search starts: the best estimate, in the span of the public images."""

from dataclasses import replace

import torch
from cases import peft_start
from route_cases import posed

from r2f_ext.data import load_images
from r2f_ext.inversion.label_by_label import invert_by_label
from r2f_ext.inversion.route import Public
from r2f_ext.inversion.start import (
    MIN_GRAY,
    NEARLY_GRAY,
    ONLY_GRAY,
    best_estimate,
    remarked,
    search_start,
    spanning,
)
from r2f_ext.inversion.update_map import onto_span
from r2f_ext.models import load_base
from r2f_ext.pairs import GeneratedPairs
from r2f_ext.types import Reconstruction


def estimate(route: str, images: torch.Tensor, pairs: float) -> Reconstruction:
    return Reconstruction(route, images, torch.tensor([2, 2]), "", 0.0, {"pairs_a_victim": pairs})


def test_a_point_moves_to_the_nearest_one_of_the_span() -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(9, 3, dtype=torch.float64)).Q * torch.tensor([2.0, 0.1, 1.0])
    mean, points = torch.rand(9, dtype=torch.float64), torch.rand(4, 9, dtype=torch.float64)
    found = onto_span(points, mean, basis)
    expected = torch.linalg.lstsq(basis, (points - mean).T).solution
    torch.testing.assert_close(found, mean + (basis @ expected).T)
    torch.testing.assert_close(onto_span(found, mean, basis), found)


def test_what_lies_outside_the_span_is_taken_off() -> None:
    """The proxies vary along few directions, and the start has a part of another one."""
    problem, images = posed()
    assert problem.proxies is not None
    on = search_start(replace(problem, found={"a": estimate("a", images, 1)}), ["a"])
    basis = on.subspace.basis
    beside = torch.linalg.qr(basis, mode="complete").Q[:, -1]  # orthogonal to every direction of the subspace
    off = images + 0.05 * (beside / beside.abs().max()).view(images.shape[1:])
    found = search_start(replace(problem, found={"a": estimate("a", off, 1)}), ["a"])
    torch.testing.assert_close(found.estimate.images, on.estimate.images, rtol=0, atol=1e-6)
    assert basis.shape[1] < 80 and (off - images).abs().max() > 0.02


def test_the_estimate_from_most_pairs_is_taken_of_those_that_were_found() -> None:
    problem, images = posed()
    one, other = estimate("one", images, 50), estimate("other", images, 800)
    for routes, chosen in ((["one", "other"], "other"), (["one", "none"], "one")):
        assert best_estimate(replace(problem, found={"one": one, "other": other}), routes).route == chosen


def test_the_space_is_that_of_the_public_images_where_there_are_any() -> None:
    problem, images = posed()
    assert problem.proxies is not None
    public = load_images("procedural", input_shape=(3, 16, 16), num_classes=5, count=60)
    found = search_start(replace(problem, public=Public(public), found={"a": estimate("a", images, 1)}), ["a"])
    assert found.subspace.basis.shape == (768, 59) and found.subspace.basis.dtype == images.dtype


def test_gray_estimates_are_searched_for_among_gray_images() -> None:
    """Estimates from images of which a third are in colour are not quite gray; one in colour asks for all images."""
    torch.manual_seed(0)
    gray = torch.rand(MIN_GRAY, 1, 8, 8).expand(-1, 3, -1, -1)
    images = torch.cat([torch.rand(500, 3, 8, 8), gray])
    estimates = gray[:2] + 0.01 * torch.randn(2, 3, 8, 8)
    assert torch.equal(spanning(images, estimates), gray)
    assert spanning(images, torch.cat([estimates, images[:1]])) is images
    for all_of_them in (images[:-1], gray):  # one gray image too few; no other ones
        assert spanning(all_of_them, estimates) is all_of_them


def test_a_search_among_gray_images_says_so() -> None:
    problem, images = posed()
    public = load_images("procedural", input_shape=(3, 16, 16), num_classes=5, count=2 * MIN_GRAY)
    gray = images.mean(1, keepdim=True).expand_as(images)
    for estimated, remark in ((gray, ONLY_GRAY), (images, "")):
        found = search_start(replace(problem, public=Public(public), found={"a": estimate("a", estimated, 1)}), ["a"])
        assert found.remark == remark and remarked(found.estimate, found.remark).why.endswith(remark)
        channels = found.subspace.basis.unflatten(0, (3, 256))
        assert bool(((channels - channels[:1]).abs() < 1e-3).all()) is bool(remark)


def test_most_estimates_of_generated_images_show_whether_these_are_gray() -> None:
    """Of held-out images, from updates of one step of the embedded base. Faint colours go unseen, see the document."""
    base = load_base("embedded")
    target, a = peft_start(base)
    images = load_images("procedural", count=1100)
    label = images.take(torch.arange(1100)).relabelled(3)
    victims = label.take(torch.arange(1000, 1100))
    (batch,) = GeneratedPairs(target, a, victims).batches()
    found = invert_by_label(target, a, label.take(torch.arange(1000)), batch.updates, labels=victims.labels)
    colour = victims.batch(slice(None)).std(1, unbiased=False).square().mean((1, 2)).sqrt()
    seen = found.reconstruction.images.std(1, unbiased=False).square().mean((1, 2)).sqrt()
    gray, strong = colour < 1e-3, colour > 0.08
    assert gray.sum() > 50 and strong.sum() >= 5
    assert (seen[gray] < NEARLY_GRAY).float().mean() > 0.9, seen[gray]
    assert (seen[strong] > NEARLY_GRAY).float().mean() > 0.9, seen[strong]
