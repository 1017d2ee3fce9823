"""Route `gauss_newton_matrix_free`: the same images without a Jacobian, at any size."""

from dataclasses import replace

import torch
from route_cases import posed, worst_psnr

from r2f_ext.inversion.matrix_free import MatrixFreeConfig, ProxyCoordinates, SpectrumCoordinates
from r2f_ext.inversion.route import Certainty
from r2f_ext.inversion.routes import gauss_newton_matrix_free as module
from r2f_ext.inversion.routes.gauss_newton_matrix_free import GaussNewtonMatrixFree
from r2f_ext.inversion.update_map import Subspace
from r2f_ext.progress import no_progress
from r2f_ext.types import Reconstruction


def test_finds_the_images_from_a_near_start() -> None:
    problem, images = posed()
    assert problem.proxies is not None
    basis = Subspace.of(problem.proxies.images).basis
    torch.manual_seed(1)
    shift = 0.2 * torch.randn(2, basis.shape[1], dtype=torch.float64) @ basis.T
    near = Reconstruction("amortised", (images + shift.view_as(images)).clamp(0, 1), torch.tensor([2, 2]), "", 0.0)
    config = MatrixFreeConfig(krylov=12, points=8)
    found = GaussNewtonMatrixFree().run(replace(problem, found={"amortised": near}, matrix_free=config), no_progress)
    assert found.route == "gauss_newton_matrix_free" and found.per_victim["free_directions"].min() >= 384
    assert worst_psnr(found.images, images) > 60


def test_large_images_are_taken_and_several_steps_are_not() -> None:
    problem, _ = posed()
    assert problem.proxies is not None
    route = GaussNewtonMatrixFree()
    large = replace(problem, base=replace(problem.base, input_shape=(3, 224, 224)))
    assert route.verdict(large).certainty is Certainty.PLAUSIBLE
    assert "more than one step" in route.verdict(replace(problem, steps=None)).why
    found = {"amortised": Reconstruction("amortised", problem.proxies.images[:2], None, "", 0.0)}
    for posed_so, coordinates in ((large, SpectrumCoordinates), (problem, ProxyCoordinates)):
        assert isinstance(module._start(replace(posed_so, found=found), route.after)[1], coordinates)
