"""Where a search starts: the best estimate, in the span of the public images."""

from dataclasses import replace

import torch
from route_cases import posed

from r2f_ext.data import load_images
from r2f_ext.inversion.route import Public
from r2f_ext.inversion.start import best_estimate, search_start
from r2f_ext.inversion.update_map import onto_span
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
