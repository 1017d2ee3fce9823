"""Preconditioned descent, on a curved and badly conditioned valley."""

import torch

from r2f_ext.inversion.preconditioned import CHECK_EVERY, _Memory, preconditioned_descent
from r2f_ext.inversion.side_by_side import DAMPING
from r2f_ext.linalg import precise_gram


def valley(points):
    """z(x), whose lines of small misfit are bent: a steep function of a curve and nine flat directions."""
    steep = 300 * (points[..., :1] - points[..., 1:].square().sum(-1, keepdim=True))
    return torch.cat([steep, points[..., 1:]], dim=-1)


def descended(misfit, start, jacobian, basis, evaluations=300):
    """One victim's descent from start [p] with the damping that a search begins with."""

    def slopes_of(points, _):
        points = points.clone().requires_grad_()
        losses = misfit(points)
        return losses.detach(), torch.autograd.grad(losses.sum(), points)[0]

    damping = torch.tensor([DAMPING], dtype=torch.float64)
    gram = precise_gram(jacobian)[None]
    return preconditioned_descent(slopes_of, start[None], gram, basis, damping, evaluations=evaluations)[0]


def test_descent_follows_a_bent_valley_where_plain_steps_of_the_same_number_do_not():
    torch.manual_seed(0)
    image = torch.rand(10, dtype=torch.float64)
    wanted, start = valley(image), torch.zeros(10, dtype=torch.float64)
    misfit = lambda point: (valley(point) - wanted).square().sum(-1) / 2  # noqa: E731
    basis = torch.eye(10, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(valley, start).T
    found = descended(misfit, start, jacobian, basis, 250)
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
    found = descended(lambda x: (x - wanted).square().sum(-1) / 2, start, basis.T.contiguous(), basis)
    torch.testing.assert_close(found, torch.tensor([0.1, 0.5, 0.9, 0.5]))


def test_a_map_that_does_not_depend_on_the_image_leaves_the_point_where_it_is():
    start = torch.full((3,), 0.5)
    found = descended(lambda x: 0 * x.sum(-1), start, torch.zeros(3, 5), torch.eye(3))
    assert torch.equal(found, start)


def test_a_jacobian_that_is_not_finite_leaves_the_point_where_it_is():
    start = torch.full((3,), 0.5)
    found = descended(lambda x: x.sum(-1), start, torch.full((3, 5), torch.nan), torch.eye(3))
    assert torch.equal(found, start)


def test_the_compact_direction_is_that_of_the_two_loops():
    """Against the two-loop recursion (Nocedal and Wright 2006, algorithm 7.4), with fewer pairs than fit, and none."""
    torch.manual_seed(0)
    hessian = torch.diag(torch.logspace(-2, 2, 12, dtype=torch.float64))
    slope = torch.randn(2, 12, dtype=torch.float64)
    empty = torch.zeros(2, 5, 12, dtype=torch.float64)
    memory, pairs = _Memory(empty, empty), []
    torch.testing.assert_close(memory.direction(slope), -slope)
    for _ in range(3):
        step = torch.randn(2, 12, dtype=torch.float64)
        pairs.append((step, step @ hessian))
        memory = memory.with_pairs(*pairs[-1], torch.tensor([True, False]))
    q, shares = slope[0].clone(), []
    for step, change in ((s[0], y[0]) for s, y in reversed(pairs)):
        shares.append(step @ q / (step @ change))
        q -= shares[-1] * change
    last, change = (each[0] for each in pairs[-1])
    r = q * (last @ change) / change.square().sum()
    for (step, change), share in zip(((s[0], y[0]) for s, y in pairs), reversed(shares), strict=True):
        r += step * (share - change @ r / (step @ change))
    torch.testing.assert_close(memory.direction(slope), torch.stack([-r, -slope[1]]))
    torch.testing.assert_close(memory.without(torch.tensor([True, False])).direction(slope), -slope)


def test_victims_side_by_side_go_the_way_that_each_goes_alone():
    torch.manual_seed(1)
    images = torch.rand(3, 10, dtype=torch.float64)
    starts, basis = torch.rand(3, 10, dtype=torch.float64), torch.eye(10, dtype=torch.float64)
    grams = torch.stack([precise_gram(torch.autograd.functional.jacobian(valley, start).T) for start in starts])
    dampings = torch.tensor([1e-3, 1e-4, 1e-5], dtype=torch.float64)

    def slopes_of(points, wanted):
        points = points.clone().requires_grad_()
        losses = (valley(points) - wanted).square().sum(-1) / 2
        return losses.detach(), torch.autograd.grad(losses.sum(), points)[0]

    wanted = valley(images)
    together = preconditioned_descent(
        lambda x, rows: slopes_of(x, wanted[rows]), starts, grams, basis, dampings, evaluations=30
    )
    for v in range(3):
        rows = slice(v, v + 1)
        mine, own = (
            (lambda x, _, rows=rows: slopes_of(x, wanted[rows])),
            (starts[rows], grams[rows], basis, dampings[rows]),
        )
        torch.testing.assert_close(
            preconditioned_descent(mine, *own, evaluations=30)[0], together[v], rtol=1e-6, atol=1e-8
        )


def test_a_victim_that_does_not_gain_or_need_to_leaves_the_descent():
    """The first one's misfit is quadratic, the second one's a bent valley, which takes longer."""
    basis, taken = torch.eye(4, dtype=torch.float64), []
    wanted = torch.rand(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def slopes_of(points, rows):
        taken.append(rows.tolist())
        points = points.clone().requires_grad_()
        easy = (points - wanted[rows]).square().sum(1) / 2
        bent = (valley(points) - valley(wanted[rows])).square().sum(1) / 2
        losses = 1e-6 + torch.where(rows == 0, easy, bent)
        return losses.detach(), torch.autograd.grad(losses.sum(), points)[0]

    grams, dampings = basis.expand(2, 4, 4), torch.full((2,), DAMPING, dtype=torch.float64)
    found = preconditioned_descent(slopes_of, torch.zeros_like(wanted), grams, basis, dampings)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    both, one = taken.count([0, 1]), taken.count([1])
    assert both == 1 + 2 * CHECK_EVERY and one >= CHECK_EVERY and both + one == len(taken)
    taken.clear()
    preconditioned_descent(slopes_of, torch.zeros_like(wanted), grams, basis, dampings, enough=1e6)
    assert taken == [[0, 1]] * (1 + CHECK_EVERY)
