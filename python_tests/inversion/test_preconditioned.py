"""Preconditioned descent, on a curved and badly conditioned valley."""

import torch

from r2f_ext.inversion.preconditioned import preconditioned_descent


def valley(points):
    """z(x), whose lines of small misfit are bent: a steep function of a curve and nine flat directions."""
    steep = 300 * (points[..., :1] - points[..., 1:].square().sum(-1, keepdim=True))
    return torch.cat([steep, points[..., 1:]], dim=-1)


def test_descent_follows_a_bent_valley_where_plain_steps_of_the_same_number_do_not():
    torch.manual_seed(0)
    image = torch.rand(10, dtype=torch.float64)
    wanted, start = valley(image), torch.zeros(10, dtype=torch.float64)
    misfit = lambda point: (valley(point) - wanted).square().sum() / 2  # noqa: E731
    basis = torch.eye(10, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(valley, start).T
    found = preconditioned_descent(misfit, start, jacobian, basis, steps=200)
    assert (found - image).abs().max() < 1e-6
    plain = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([plain], lr=1e-6)  # near the largest that the steep direction allows
    for _ in range(250):
        optimizer.zero_grad()
        misfit(plain).backward()
        optimizer.step()
    assert (plain - image).abs().max() > 0.1


def test_descent_stays_in_the_span_of_the_basis_and_keeps_the_dtype():
    torch.manual_seed(0)
    basis, start = torch.zeros(4, 2), torch.full((4,), 0.5)
    basis[0, 0], basis[2, 1] = 0.3, 0.1
    wanted = torch.tensor([0.1, 0.2, 0.9, 0.4])
    found = preconditioned_descent(lambda x: (x - wanted).square().sum() / 2, start, basis.T.contiguous(), basis)
    torch.testing.assert_close(found, torch.tensor([0.1, 0.5, 0.9, 0.5]))


def test_a_map_that_does_not_depend_on_the_image_leaves_the_point_where_it_is():
    start = torch.full((3,), 0.5)
    found = preconditioned_descent(lambda x: 0 * x.sum(), start, torch.zeros(3, 5), torch.eye(3))
    assert torch.equal(found, start)


def test_a_jacobian_that_is_not_finite_leaves_the_point_where_it_is():
    start = torch.full((3,), 0.5)
    found = preconditioned_descent(lambda x: x.sum(), start, torch.full((3, 5), torch.nan), torch.eye(3))
    assert torch.equal(found, start)
