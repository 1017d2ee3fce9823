"""The gradient that AdamW's first step shows: against torch.optim's own steps, whose errors are predicted."""

import pytest
import torch

from r2f_ext.errors import R2FError
from r2f_ext.inversion.adamw_step import AIM, FINE_AIM, first_adamw_step
from r2f_ext.pairs import Training


def stepped(gradient, lr, dtype=torch.float32):
    """B after AdamW's first step from 0, and the step as it is read from B."""
    b = torch.zeros(gradient.shape, dtype=dtype, requires_grad=True)
    b.grad = gradient.to(dtype)
    torch.optim.AdamW([b], lr=lr).step()
    return first_adamw_step({"layer": b.detach()}, Training(optimizer="adamw", lr=lr))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamws_first_step_still_shows_its_small_entries(dtype):
    gradient = 10 ** -(2 + 4 * torch.rand(40, 8, dtype=torch.float64)) * torch.randn(40, 8).sign()
    b = torch.zeros(40, 8, dtype=dtype, requires_grad=True)
    b.grad = gradient.to(dtype)
    torch.optim.AdamW([b], lr=1e-3, weight_decay=0.01).step()
    found = first_adamw_step({"layer": b.detach()}, Training(optimizer="adamw", lr=1e-3))
    read, weights = found.gradient["layer"], found.weights(AIM)["layer"]
    trusted = weights > 0.1  # whose error is said to be up to 10 AIM of a typical entry
    assert trusted.float().mean() > (0.4 if dtype == torch.float32 else 0.99)
    error = (read - gradient).abs()[trusted].max() / gradient.square().mean().sqrt()
    assert error < (2e-2 if dtype == torch.float32 else 1e-6)
    assert weights.min() >= 0 and weights.max() <= 1


@pytest.mark.parametrize("scale", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("factor", [0.9995, 1.0005, 1.1])
def test_a_wrong_learning_rate_is_refused_and_the_one_in_b_is_named(scale, factor):
    gradient = torch.randn(96, 8, dtype=torch.float64) * scale
    b = {"layer": -1e-3 * gradient / (gradient.abs() + 1e-8)}
    with pytest.raises(R2FError, match=f"largest entry is 0.000999.*the recipe says {1e-3 * factor:.9g}"):
        first_adamw_step(b, Training(optimizer="adamw", lr=1e-3 * factor))
    read = first_adamw_step(b, Training(optimizer="adamw", lr=1e-3)).gradient["layer"]
    torch.testing.assert_close(read, gradient, rtol=1e-4, atol=0)


@pytest.mark.parametrize("lr", [1e-3, 3e-3, 2e-4, 7e-5])
@pytest.mark.parametrize("size", [1e-4, 4e-3, 0.05])
def test_the_errors_that_are_predicted_are_those_that_are_made(lr, size):
    """Also their mean, which at some rates is larger than their spread; and the residual that they leave."""
    gradient = torch.randn(400, 64, dtype=torch.float64) * size
    step = stepped(gradient, lr)
    read, errors = step.gradient["layer"], step.errors["layer"]
    precise = errors < 0.1 * gradient.abs()
    assert precise.sum() > 1000
    shares = ((read - gradient) / errors)[precise]
    # The mean of u's errors depends a little on the size, which one number for all sizes does not.
    assert 0.75 < shares.square().mean().sqrt() < 1.3 and (shares * gradient[precise].sign()).mean().abs() < 0.3
    drawn = step.drawn(4, torch.Generator().manual_seed(7))["layer"]  # not the seed of the gradient
    for aim in (AIM, FINE_AIM):
        weights = step.weights(aim)
        weighed = [weights["layer"] * each for each in (gradient, read, *drawn)]
        units = [each / each.norm() for each in weighed]
        made, *others = [float((each - units[1]).norm()) / step.noise(weights) for each in (units[0], *units[2:])]
        assert 0.9 < made < 1.1 and 0.9 < sum(others) / len(others) < 1.2


def test_entries_whose_size_is_lost_are_not_taken_for_precise_ones():
    """A gradient of a layer with heavy tails, of which most entries show only their signs."""
    gradient = torch.randn(400, 64, dtype=torch.float64) * 0.05 * torch.exp(1.5 * torch.randn(400, 1))
    step = stepped(gradient, 1e-3)
    weights = step.weights(AIM)["layer"]
    true, read = (
        torch.nn.functional.normalize((weights * each).flatten(), dim=0) for each in (gradient, step.gradient["layer"])
    )
    assert 0.2 < (weights == 0).float().mean() < 0.95
    assert 0.8 < float((true - read).norm()) / step.noise({"layer": weights}) < 1.2


def test_entries_of_which_the_sign_alone_is_known_have_no_weight():
    step = stepped(torch.tensor([[3.0, -0.7, 1e-6, 0.0, -1e-4]], dtype=torch.float64), 1e-3)
    assert step.errors["layer"].isinf().tolist() == [[True, True, False, False, False]]
    weights = step.weights(AIM)
    assert (weights["layer"] == 0).tolist() == step.errors["layer"].isinf().tolist()
    assert 0 < step.noise(weights) < 0.01 and step.drawn(2, torch.Generator())["layer"].isfinite().all()
    for signs in (torch.full((2, 2), 5.0), torch.tensor([[5.0, 0.0]])):
        with pytest.raises(R2FError, match="only the signs of layer's gradient"):
            stepped(signs, 1e-3)


@pytest.mark.parametrize("factor", [0.999, 1.001])
def test_a_wrong_rate_is_refused_in_float32_too(factor):
    b = torch.zeros(96, 8, requires_grad=True)
    b.grad = torch.randn(96, 8) * 4e-3
    torch.optim.AdamW([b], lr=1e-3).step()
    with pytest.raises(R2FError, match="the recipe says"):
        first_adamw_step({"layer": b.detach()}, Training(optimizer="adamw", lr=1e-3 * factor))


def test_other_recipes_are_refused():
    b = {"layer": torch.full((4, 2), 0.3)}
    with pytest.raises(R2FError, match="only the first step"):
        first_adamw_step(b, Training(steps=2, optimizer="adamw"))
    with pytest.raises(R2FError, match="pass the victim's own"):
        first_adamw_step(b, Training(optimizer="adamw"))
    half = {"layer": torch.randn(4, 2).bfloat16().float()}
    with pytest.raises(R2FError, match="B of layer has half precision"):
        first_adamw_step(half, Training(optimizer="adamw"))
