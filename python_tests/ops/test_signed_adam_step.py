"""signed_adam_step_ against torch.optim.Adam on the signed gradient, and clamp_."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from r2f_ext.ops import backend_of, build_information, reference, signed_adam_step_

SHAPES = [(3, 2, 7, 5), (1,), (), (0,), (33,), (2, 3, 100, 113)]


def make(shape, dtype=torch.float32, device="cpu") -> list[Tensor]:
    image = torch.rand(shape, dtype=torch.float64).to(device, dtype)
    return [image, torch.zeros_like(image), torch.zeros_like(image)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sign", [True, False])
def test_is_adam_and_a_clamp(device, dtype, shape, sign):
    image, exp_avg, exp_avg_sq = make(shape, dtype, device)
    theirs = image.clone().requires_grad_()
    optimizer = torch.optim.Adam([theirs], lr=0.05)
    for step in range(1, 51):
        optimizer.param_groups[0]["lr"] = lr = 0.05 if step < 30 else 0.005
        gradient = torch.randn(shape, device=device).to(dtype).mul_(0.3)
        signed_adam_step_(image, gradient, exp_avg, exp_avg_sq, lr=lr, step=step, sign=sign)
        theirs.grad = gradient.sign() if sign else gradient.clone()
        optimizer.step()
        with torch.no_grad():
            theirs.clamp_(0, 1)
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(image, theirs.detach(), rtol=0, atol=8 * ulp)
    if image.numel():
        state = optimizer.state[theirs]
        torch.testing.assert_close(exp_avg, state["exp_avg"], rtol=16 * ulp, atol=4 * ulp)
        torch.testing.assert_close(exp_avg_sq, state["exp_avg_sq"], rtol=16 * ulp, atol=ulp)


@pytest.mark.parametrize(("low", "high"), [(None, None), (0.4, None), (None, 0.6), (-1.0, 2.0)])
def test_agrees_with_the_reference_with_and_without_a_box(device, low, high):
    ours, theirs = make((5, 67), device=device), make((5, 67), device=device)
    theirs[0].copy_(ours[0])
    for step in range(1, 4):
        gradient = torch.randn(5, 67, device=device)
        settings = (0.3, 0.8, 0.99, 1e-6, step, low, high, True)
        torch.ops.r2f.signed_adam_step_(ours[0], gradient, *ours[1:], *settings)
        reference.signed_adam_step_(theirs[0], gradient, *theirs[1:], *settings)
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected)


def test_zeros_and_nan(device):
    image, exp_avg, exp_avg_sq = make((40,), device=device)
    before, gradient = image.clone(), torch.zeros(40, device=device)
    signed_adam_step_(image, gradient, exp_avg, exp_avg_sq, lr=0.1, step=1)
    assert torch.equal(image, before)
    image[17] = float("nan")
    signed_adam_step_(image, gradient, exp_avg, exp_avg_sq, lr=0.1, step=2)
    assert torch.isnan(image).nonzero().tolist() == [[17]]


def test_any_strides(device):
    gradient = torch.randn(4, 6, 10, device=device)
    contiguous = make((4, 6, 10), device=device)
    strided = [t.mT.contiguous().mT for t in contiguous[:2]] + [contiguous[2].clone()]
    sliced = [torch.cat([t, t], dim=1)[:, :6] for t in contiguous]
    for image, *state in (contiguous, strided, sliced):
        signed_adam_step_(image, gradient, *state, lr=0.1, step=1)
    for other in (strided, sliced):
        for got, expected in zip(other, contiguous, strict=True):
            assert torch.equal(got, expected)
    unaligned = [torch.zeros(101, device=device)[1:] for _ in range(3)]
    signed_adam_step_(unaligned[0], torch.ones(101, device=device)[1:], *unaligned[1:], lr=0.1, step=1, low=None)
    torch.testing.assert_close(unaligned[0], torch.full((100,), -0.1, device=device))


def test_autograd_sees_the_writing(device):
    image, exp_avg, exp_avg_sq = make((5,), device=device)
    image.requires_grad_()
    loss = image.square().sum()
    signed_adam_step_(image, torch.ones(5, device=device), exp_avg, exp_avg_sq, lr=0.1, step=1)
    assert image.requires_grad and image.is_leaf
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_operator_rules(device):
    image, exp_avg, exp_avg_sq = make((6, 7), device=device)
    inputs = (image, torch.randn(6, 7, device=device), exp_avg, exp_avg_sq, 0.1, 0.9, 0.999, 1e-8, 1, 0.0, 1.0, True)
    torch.library.opcheck(torch.ops.r2f.signed_adam_step_.default, inputs)


@pytest.mark.slow
def test_inside_torch_compile(device):
    compiled, eager = make((6, 7), device=device), make((6, 7), device=device)
    eager[0].copy_(compiled[0])
    gradient = torch.randn(6, 7, device=device)

    def step(image: Tensor, *state: Tensor) -> Tensor:
        signed_adam_step_(image, gradient, *state, lr=0.1, step=1)
        return image.sum()

    torch.testing.assert_close(torch.compile(step, fullgraph=True)(*compiled), step(*eager))
    torch.testing.assert_close(compiled, eager)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_under_cuda_graph_capture():
    image, exp_avg, exp_avg_sq = make((1000,), device="cuda")
    gradient = torch.randn(1000, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        signed_adam_step_(image, gradient, exp_avg, exp_avg_sq, lr=0.1, step=1)
    expected = [image.clone(), exp_avg.clone(), exp_avg_sq.clone()]
    signed_adam_step_(expected[0], gradient, *expected[1:], lr=0.1, step=1)
    graph.replay()
    torch.testing.assert_close([image, exp_avg, exp_avg_sq], expected)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"gradient": torch.zeros(3)}, ValueError, "must have image's shape"),
        ({"exp_avg_sq": torch.zeros(4, 1)}, ValueError, "must have image's shape"),
        ({"exp_avg": torch.zeros(4).double()}, TypeError, r"exp_avg\[0\] must be torch.float32"),
        ({"image": torch.zeros(4).bfloat16()}, TypeError, "float32 or float64"),
        ({"gradient": torch.zeros(4, device="meta")}, ValueError, "one device"),
        ({"step": 0}, ValueError, "step counts from 1"),
        ({"low": 2.0}, ValueError, "low must not be above high"),
    ],
)
def test_errors_name_the_argument(change, error, words):
    good = {name: torch.zeros(4) for name in ("image", "gradient", "exp_avg", "exp_avg_sq")}
    with pytest.raises(error, match=words):
        signed_adam_step_(**{**good, "lr": 0.1, "step": 1, **change})


@pytest.mark.skipif(not build_information()["loaded"], reason="no compiled kernels")
@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_narrower_instruction_sets_agree(isa):
    assert backend_of("signed_adam_step_", "cpu") == "cpu"
    code = (
        "import torch; from r2f_ext.ops import reference; torch.manual_seed(0);"
        "a = [torch.rand(77).double() for _ in range(3)]; b = [t.clone() for t in a]; g = torch.randn(77).double();"
        "s = (.1, .9, .999, 1e-8, 3, 0., 1., False); torch.ops.r2f.signed_adam_step_(a[0], g, *a[1:], *s);"
        "reference.signed_adam_step_(b[0], g, *b[1:], *s);"
        "print(max((x - y).abs().max().item() for x, y in zip(a, b)) < 1e-14)"
    )
    command, environment = [sys.executable, "-c", code], {**os.environ, "R2F_CPU_ISA": isa}
    assert subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip() == "True"
