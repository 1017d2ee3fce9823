"""Adam against torch.optim, L-BFGS on functions whose minima are known."""

import pytest
import torch

from r2f_ext.inversion.optimizers import LBFGS, MEMORY, Adam


def quadratic(trials=3, pixels=12, condition=1e3):
    """f_t(x) = (x - m_t)^T H (x - m_t) / 2, with the same H and other minima."""
    torch.manual_seed(1)
    basis, _ = torch.linalg.qr(torch.randn(pixels, pixels).double())
    hessian = basis @ torch.diag(torch.logspace(0, torch.log10(torch.tensor(condition)), pixels).double()) @ basis.mT
    minima = torch.rand(trials, 1, 3, 2, 2).double()

    def evaluate(images):
        d = (images - minima).flatten(1)
        return 0.5 * ((d @ hessian) * d).sum(1), (d @ hessian).view_as(images)

    return evaluate, minima


def walk(optimizer, images, evaluate, steps, size=0.1):
    losses = []
    for k in range(steps):
        loss, slope = evaluate(images)
        losses.append(loss)
        optimizer.step(images, loss, slope, size, k + 1)
    return torch.stack(losses)


@pytest.mark.parametrize("sign", [True, False])
def test_adam_is_torch_adam(sign):
    evaluate, minima = quadratic()
    images = torch.full_like(minima, 0.5)
    other = images.clone().requires_grad_()
    reference = torch.optim.Adam([other], lr=0.1)
    walk(Adam(images, (0.0, 1.0), sign), images, evaluate, 7)
    for _ in range(7):
        slope = evaluate(other.detach())[1]
        other.grad = slope.sign() if sign else slope
        reference.step()
        other.data.clamp_(0, 1)
    torch.testing.assert_close(images, other.detach())


def test_lbfgs_finds_the_minimum():
    evaluate, minima = quadratic()
    images = torch.zeros_like(minima)
    losses = walk(LBFGS(images, None), images, evaluate, 200)
    assert (losses.amin(0) < 1e-9 * losses[0]).all()


def test_lbfgs_on_the_rosenbrock_function():
    images = torch.tensor([[-1.2, 1.0], [0.0, 0.0]]).double().view(2, 1, 1, 1, 2)

    def evaluate(points):
        points = points.clone().requires_grad_()
        x, y = points.flatten(1).unbind(1)
        loss = (1 - x).square() + 100 * (y - x.square()).square()
        return loss.detach(), torch.autograd.grad(loss.sum(), points)[0]

    losses = walk(LBFGS(images, None), images, evaluate, 120)
    assert losses.amin(0).max() < 1e-10


def test_lbfgs_keeps_to_the_box_and_finds_its_corner():
    evaluate, minima = quadratic(condition=1.0)
    minima += torch.where(torch.rand_like(minima) < 0.5, 3.0, -3.0)  # all beyond the box
    images = torch.full_like(minima, 0.5)
    walk(LBFGS(images, (0.0, 1.0)), images, evaluate, 30)
    torch.testing.assert_close(images, (minima > 0.5).double())


def test_trials_of_lbfgs_do_not_know_one_another():
    evaluate, minima = quadratic()
    together, alone = torch.zeros_like(minima), torch.zeros_like(minima)
    walk(LBFGS(together, (0.0, 1.0)), together, evaluate, 2 * MEMORY)
    for t in range(3):
        one = alone[t : t + 1]
        optimizer = LBFGS(one, (0.0, 1.0))
        for k in range(2 * MEMORY):
            loss, slope = evaluate(alone)
            optimizer.step(one, loss[t : t + 1], slope[t : t + 1], 0.1, k + 1)
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)


def test_lbfgs_backs_off_where_the_loss_is_not_a_number():
    """-log x has no value below zero: a step there is halved, not taken."""
    images = torch.full((1, 1, 1, 1, 2), 0.05).double()
    optimizer, low = LBFGS(images, None), float("inf")
    for k in range(60):
        loss = (images - 0.01 * images.log()).flatten(1).sum(1)
        low = min(low, float(loss.nan_to_num(torch.inf)))
        optimizer.step(images, loss, 1 - 0.01 / images, 0.2, k + 1)
    best = 2 * (0.01 - 0.01 * torch.log(torch.tensor(0.01)))
    assert low == pytest.approx(float(best), abs=1e-6)
