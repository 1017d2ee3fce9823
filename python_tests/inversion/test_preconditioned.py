"""Preconditioned descent, on a curved and badly conditioned valley."""

import subprocess
import sys

import torch

from r2f_ext.inversion.preconditioned import (
    CHECK_EVERY,
    STAGES,
    Expected,
    _Memory,
    annealed_descent,
    preconditioned_descent,
)
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
    taken.clear()
    own = torch.tensor([0.0, 1e6], dtype=torch.float64)  # one for each victim
    preconditioned_descent(slopes_of, torch.zeros_like(wanted), grams, basis, dampings, enough=own)
    assert taken[: 1 + CHECK_EVERY] == [[0, 1]] * (1 + CHECK_EVERY)
    assert [0] in taken and taken.count([0, 1]) == 1 + CHECK_EVERY and [1] not in taken


def expected_at(centres, covariances):
    return Expected.of_covariances(centres, torch.eye(centres.shape[1], dtype=torch.float64), covariances)


def test_distances_are_those_of_mahalanobis_and_their_slopes_those_of_autograd():
    torch.manual_seed(0)
    directions, _ = torch.linalg.qr(torch.randn(6, 4, dtype=torch.float64))
    roots = torch.randn(2, 4, 4, dtype=torch.float64)
    covariances, centres = roots @ roots.mT + torch.eye(4), torch.rand(2, 6, dtype=torch.float64)
    expected = Expected.of_covariances(centres, directions, covariances)
    points = torch.rand(2, 6, dtype=torch.float64, requires_grad=True)
    normal = [torch.distributions.MultivariateNormal(torch.zeros(4).double(), each) for each in covariances]
    zero = torch.zeros(4, dtype=torch.float64)
    logs = [
        n.log_prob(zero) - n.log_prob((p - c) @ directions) for n, p, c in zip(normal, points, centres, strict=True)
    ]
    distances, slopes = expected.distances(points.detach())
    torch.testing.assert_close(distances, torch.stack(logs).detach())
    torch.testing.assert_close(slopes, torch.autograd.grad(sum(logs), points)[0])
    basis, moves = directions * torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.randn(2, 4, dtype=torch.float64)
    moved = expected.distances(centres + moves @ basis.T)[0]
    along = expected.along(basis)
    torch.testing.assert_close(torch.einsum("vi,vij,vj->v", moves, along, moves) / 2, moved)


def test_a_pulled_descent_ends_where_the_misfit_does_and_the_image_is_expected():
    """One equation w x = 1 for three numbers: of all solutions the one of the smallest distance, C w / (w C w)."""
    w = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    covariance, start = torch.diag(torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)), torch.zeros(1, 3).double()
    basis = torch.eye(3, dtype=torch.float64)

    def slopes_of(points, _):
        errors = points @ w - 1
        return errors.square() / 2, errors[:, None] * w

    given = start, torch.outer(w, w)[None], basis, torch.tensor([DAMPING], dtype=torch.float64)
    found = annealed_descent(slopes_of, expected_at(start, covariance[None]), *given)[0]
    torch.testing.assert_close(found, covariance @ w / (w @ covariance @ w), rtol=0, atol=2e-3)
    alone = preconditioned_descent(slopes_of, *given)[0]
    torch.testing.assert_close(alone, torch.full((3,), 1 / 3, dtype=torch.float64), rtol=0, atol=1e-6)


def test_a_pulled_descent_comes_to_the_image_wherever_it_is_expected():
    """The pull fades with the misfit: in a bent valley, from a start whose errors are expected to be too small."""
    torch.manual_seed(0)
    image, basis = torch.rand(10, dtype=torch.float64), torch.eye(10, dtype=torch.float64)
    wanted, start = valley(image), torch.zeros(1, 10, dtype=torch.float64)

    def slopes_of(points, _):
        points = points.clone().requires_grad_()
        losses = (valley(points) - wanted).square().sum(1) / 2
        return losses.detach(), torch.autograd.grad(losses.sum(), points)[0]

    gram = precise_gram(torch.autograd.functional.jacobian(valley, start[0]).T)[None]
    expected = expected_at(start, 0.1 * basis[None])
    found = annealed_descent(slopes_of, expected, start, gram, basis, torch.tensor([DAMPING], dtype=torch.float64))
    assert (found[0] - image).abs().max() < 1e-2 < (start[0] - image).abs().max()


def test_victims_of_a_small_misfit_are_left_where_they_are():
    basis, taken = torch.eye(2, dtype=torch.float64), []
    points = torch.tensor([[0.1, 0.0], [3.0, 4.0]], dtype=torch.float64)

    def slopes_of(points, rows):
        taken.append(rows.tolist())
        return points.square().sum(1) / 2, points

    found = annealed_descent(
        slopes_of,
        expected_at(points, basis.expand(2, 2, 2)),
        points,
        basis.expand(2, 2, 2),
        basis,
        torch.full((2,), DAMPING, dtype=torch.float64),
        enough=0.01,
    )
    assert torch.equal(found[0], points[0]) and found[1].norm() < 1 and taken[0] == [0, 1] and taken[1] == [1]
    assert len(taken) <= STAGES * (2 + 2 * CHECK_EVERY)


ON_TWO_THREADS = """
import torch
from r2f_ext.inversion.preconditioned import Expected
torch.manual_seed(0)
torch.set_num_threads(2)
factors = torch.randn(8, 600, 600, dtype=torch.float64)
covariances = factors @ factors.mT / 600 + 1e-3 * torch.eye(600)
found = Expected.of_covariances(torch.zeros(8, 600), torch.eye(600), covariances).precisions
assert (found @ covariances - torch.eye(600)).abs().max() < 1e-8
"""


def test_precisions_are_found_after_a_caller_has_set_the_number_of_threads():
    subprocess.run([sys.executable, "-c", ON_TWO_THREADS], check=True, timeout=120)
