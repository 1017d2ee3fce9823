"""Gauss-Newton from products alone: on a small ViT in float64, against autograd and the dense search."""

import pytest
import torch
from cases import target_of, tiny_base

from r2f_ext.capture import Capture
from r2f_ext.inversion.exactness import REPRODUCED
from r2f_ext.inversion.gauss_newton import search
from r2f_ext.inversion.matrix_free import (
    AtPoint,
    MatrixFreeConfig,
    ProxyCoordinates,
    SpectrumCoordinates,
    krylov,
    search_matrix_free,
)
from r2f_ext.inversion.task import GaussNewtonConfig
from r2f_ext.inversion.update_map import Subspace, UpdateMap, flat_units

NAMES = tuple(f"blocks.{b}.{layer}" for b in (0, 1) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))
SHAPE = torch.Size((3, 16, 16))
LABEL = torch.tensor([1])


@pytest.fixture(scope="module")
def problem():
    """target, A, an image of which only 40 directions are unknown, a start near it, the subspace."""
    target = target_of(tiny_base(), NAMES, rank=8)
    torch.manual_seed(0)
    a = {layer.name: torch.randn(8, layer.d_in, dtype=torch.float64) / layer.d_in**0.5 for layer in target.layers}
    smooth = torch.randn(40, 768, dtype=torch.float64) * 0.05
    proxies = (0.5 + torch.randn(300, 40, dtype=torch.float64) @ smooth / 40**0.5).clamp(0, 1)
    subspace = Subspace.of(proxies.unflatten(1, SHAPE))
    noise = torch.randn(subspace.basis.shape[1], dtype=torch.float64)
    start = (proxies[0] + 0.2 * subspace.basis @ noise).clamp(0, 1)
    return target, a, proxies[0], start, subspace


@pytest.fixture(scope="module")
def updates(problem):
    """Traced once."""
    target, a, *_ = problem
    return UpdateMap(target, a, SHAPE, 64)


def test_forward_equals_differences_and_backward_is_its_transpose(problem, updates):
    image = problem[2]
    here, direction, step = AtPoint(updates, image, LABEL), torch.randn(768, dtype=torch.float64), 1e-6
    along = here.forward(direction)
    ahead, behind = (updates((image + s * step * direction)[None], LABEL)[0] for s in (1, -1))
    torch.testing.assert_close(along, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-8)
    rows = torch.randn(len(along), dtype=torch.float64)
    torch.testing.assert_close(here.backward(rows) @ direction, rows @ along)


def test_reaches_the_image_that_the_dense_search_reaches(problem, updates):
    _, _, image, start, subspace = problem
    observed = updates(image[None], LABEL)[0]
    config = MatrixFreeConfig(krylov=20, points=8)
    found = search_matrix_free(updates, observed, start, LABEL, ProxyCoordinates(subspace), config)
    assert (start - image).abs().max() > 1e-2 and found.residual < REPRODUCED
    assert (found.image - image).abs().max() < 1e-4
    dense = search(updates, observed, start, LABEL, subspace, GaussNewtonConfig())
    torch.testing.assert_close(found.image, dense.image, rtol=0, atol=1e-4)


def test_a_full_gradient_is_observed_through_a_random_a(problem, updates):
    """As `benchmarks/inversion/gauss_newton_variants.py` searches for images of exact gradients."""
    target, a, image, *_ = problem
    with Capture(target) as capture:
        gradient = capture(image.view(1, 1, *SHAPE), LABEL[None])
    seen = {name: gradient.dense(name) @ a[name].mT for name in NAMES}
    torch.testing.assert_close(updates(image[None], LABEL)[0], flat_units(seen)[0])


def test_no_point_is_linearised_after_the_time_limit(problem, updates):
    _, _, image, start, subspace = problem
    observed = updates(image[None], LABEL)[0]
    config = MatrixFreeConfig(krylov=2, minutes=1e-9)
    found = search_matrix_free(updates, observed, start, LABEL, ProxyCoordinates(subspace), config)
    assert found.stopped and found.passes == 0
    torch.testing.assert_close(found.image, start, rtol=0, atol=0)


def test_krylov_holds_the_damped_solution():
    rows = torch.randn(30, 30, dtype=torch.float64)
    matrix, start = rows @ rows.T, torch.randn(30, dtype=torch.float64)
    values, axes = krylov(lambda v: matrix @ v, start, 30)
    found = axes @ ((axes.T @ start) / (values + 0.1))
    torch.testing.assert_close(found, torch.linalg.solve(matrix + 0.1 * torch.eye(30, dtype=torch.float64), start))


def test_krylov_stops_where_its_space_is_exhausted():
    matrix = torch.diag(torch.tensor([3.0, 2.0, 0.0, 0.0], dtype=torch.float64))
    values, axes = krylov(lambda v: matrix @ v, torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64), 4)
    torch.testing.assert_close(values, torch.tensor([2.0, 3.0], dtype=torch.float64))
    assert axes.shape == (4, 2)


@pytest.mark.parametrize("size", [(3, 16, 16), (1, 9, 7)])
def test_spectrum_is_symmetric_smooth_and_of_its_deviation(size):
    coordinates, count = SpectrumCoordinates(size, deviation=0.2), size[0] * size[1] * size[2]
    u, v = torch.randn(2, count, dtype=torch.float64)
    torch.testing.assert_close(coordinates.spread(u) @ v, u @ coordinates.gather(v))
    spread = torch.stack([coordinates.spread(e) for e in torch.eye(count, dtype=torch.float64)])
    torch.testing.assert_close(spread.square().sum(0).sqrt(), torch.full((count,), 0.2, dtype=torch.float64))
