"""Every trial's gradient, and its derivative along a direction, against autograd on one trial at a time."""

import pytest
import torch
import torch.nn.functional as F
from cases import CONV, LINEAR, samples, target_of, tiny_base
from torch import nn

from r2f_ext.errors import R2FError
from r2f_ext.inversion.candidates import LayerGradients, ParameterGradients, candidates_of
from r2f_ext.types import BaseModel, Gradient

NAMES = (CONV, *LINEAR)


def base_of(model, dtype=torch.float64):
    return BaseModel(model.to(dtype).eval().requires_grad_(False), "net", (3, 8, 8), (0.4,) * 3, (0.3,) * 3, 5)


def conv_net(pool=nn.AvgPool2d):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6), nn.Tanh(),
        nn.Conv2d(6, 6, 3, padding=1, groups=2), nn.Tanh(), pool(2), nn.Flatten(), nn.Dropout(0.5),
        nn.Linear(24, 5),
    )  # fmt: skip


def one_by_one(base, images, labels, names, create_graph=False):
    """Gradients of each trial's mean loss by autograd on the model's own parameters: name -> [T, *shape]."""
    parameters = [base.model.get_parameter(name).requires_grad_() for name in names]
    taken = []
    for image, label in zip(images, labels, strict=True):
        loss = F.cross_entropy(base.model(base.normalize(image)), label)
        taken.append(torch.autograd.grad(loss, parameters, create_graph=create_graph))
    for parameter in parameters:
        parameter.requires_grad_(False)
    return {name: torch.stack(each) for name, each in zip(names, zip(*taken, strict=True), strict=True)}


@pytest.mark.parametrize("trials", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_parameter_gradients(trials, batch):
    base = base_of(conv_net(nn.MaxPool2d))
    names = ["0.weight", "1.weight", "3.bias", "8.weight"]
    images, labels = torch.rand(trials, batch, 3, 8, 8).double(), torch.randint(0, 5, (trials, batch))
    found = candidates_of(base, names)(images, labels)
    expected = one_by_one(base, images, labels, names)
    assert isinstance(found, Gradient) and list(found.dense) == names
    for name in names:
        torch.testing.assert_close(found.dense[name], expected[name])
    assert not any(p.requires_grad for p in base.model.parameters())


def parameters_case():
    base = base_of(conv_net())
    names = ["0.weight", "3.weight", "8.bias"]
    images, labels = torch.rand(2, 2, 3, 8, 8).double(), torch.randint(0, 5, (2, 2))
    return base, ParameterGradients(base, names), images, labels, names


def layers_case():
    base = tiny_base()
    images, labels = samples(4, base)
    candidates = LayerGradients(target_of(base, NAMES), list(NAMES))
    return base, candidates, images.unflatten(0, (2, 2)), labels.unflatten(0, (2, 2)), [f"{n}.weight" for n in NAMES]


@pytest.mark.parametrize("case", [parameters_case, layers_case])
def test_the_slope_along_a_direction(case):
    base, candidates, images, labels, names = case()
    direction = {name: torch.randn(2, *shape).double() for name, shape in candidates.shapes.items()}
    found = candidates.slope_along(images, labels, direction)
    images.requires_grad_()
    exact = one_by_one(base, images, labels, names, create_graph=True)
    along = sum((d.flatten() * g.flatten()).sum() for d, g in zip(direction.values(), exact.values(), strict=True))
    (expected,) = torch.autograd.grad(along, [images])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7 * float(expected.abs().max()))
    handles = [module._forward_hooks for module in base.model.modules()]
    assert not any(handles)


def test_the_slope_in_float32_is_good_to_a_thousandth():
    base = base_of(conv_net(), torch.float32)
    candidates = ParameterGradients(base, ["0.weight", "8.weight"])
    images, labels = torch.rand(2, 1, 3, 8, 8), torch.tensor([[1], [2]])
    direction = {name: torch.randn(2, *shape) for name, shape in candidates.shapes.items()}
    found = candidates.slope_along(images, labels, direction)
    exact = candidates_of(base_of(conv_net()), list(direction)).slope_along(
        images.double(), labels, {name: d.double() for name, d in direction.items()}
    )
    assert (found - exact).norm() < 1e-3 * exact.norm()


def test_a_direction_of_zero_has_slope_zero():
    _, candidates, images, labels, _ = parameters_case()
    nothing = {name: torch.zeros(2, *shape).double() for name, shape in candidates.shapes.items()}
    assert torch.equal(candidates.slope_along(images, labels, nothing), torch.zeros_like(images))


def test_only_the_layers_asked_for_are_captured():
    target = target_of(tiny_base(), NAMES)
    candidates = candidates_of(target, [LINEAR[1]])
    images, labels = samples(2, target.base)
    found = candidates(images[:, None], labels[:, None])
    assert list(found.x) == [LINEAR[1]] == list(candidates.shapes)


def test_what_is_not_there_is_named():
    target = target_of(tiny_base(), LINEAR)
    with pytest.raises(R2FError, match=CONV):
        candidates_of(target, [CONV])
    with pytest.raises(R2FError, match=r"no parameter nope"):
        candidates_of(target.base, ["nope"])
    net = base_of(conv_net())
    net.model.train()
    with pytest.raises(R2FError, match="training mode"):
        candidates_of(net, ["0.weight"])
