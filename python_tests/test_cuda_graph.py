"""Functions that are replayed: the same results as calls, on a GPU where there is one, and in emulation."""

from contextlib import nullcontext

import pytest
import torch
from emulated_graphs import emulated_graphs

from r2f_ext.cuda_graph import Replayed

WAYS = ["cpu", "emulated", *(["cuda"] if torch.cuda.is_available() else [])]
CAPTURING = ["emulated", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.fixture
def device(request):
    """Where the tensors are; functions of a CPU's tensors are captured in emulation, or called."""
    with emulated_graphs() if request.param == "emulated" else nullcontext():
        yield "cuda" if request.param == "cuda" else "cpu"


@pytest.mark.parametrize("device", WAYS, indirect=True)
def test_results_are_the_functions_own_for_every_shape_and_for_new_values(device):
    def slope(x, y):
        x = x.detach().requires_grad_()
        loss = (x.sin() * y).sum()
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    replayed = Replayed(slope)
    for count in (3, 5, 3, 3):
        x, y = torch.rand(count, device=device), torch.rand(count, device=device)
        for found, expected in zip(replayed(x, y), slope(x, y), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("device", CAPTURING, indirect=True)
def test_a_shape_is_captured_once_and_a_call_overwrites_the_last_results(device):
    called = []
    replayed = Replayed(lambda x: (called.append(1), x + 1)[1])
    first = replayed(torch.zeros(2, device=device))
    times = len(called)
    second = replayed(torch.ones(2, device=device))
    assert len(called) == times and second.tolist() == [2, 2] and first.tolist() == [2, 2]


def test_the_emulation_spoils_the_results_of_other_shapes_and_sees_what_waits():
    with emulated_graphs() as captures:
        replayed = Replayed(lambda x: x + 1)
        first = replayed(torch.zeros(2))
        replayed(torch.zeros(3))
        assert first.isnan().all() and replayed(torch.zeros(2)).tolist() == [1, 1]
        assert list(captures) == [True, True]
        for function in (
            lambda x: x[x > 0],
            lambda x: x * torch.tensor(2.0),
            lambda x: torch.linalg.cholesky(x[:, None] * x),
            lambda x: x.repeat_interleave(x.long()),
            lambda x: x * bool(x.sum() > 0),
        ):
            Replayed(function)(torch.ones(1))
    assert list(captures[2:]) == [False] * 5


@pytest.mark.parametrize("device", CAPTURING, indirect=True)
def test_a_function_that_waits_for_the_device_is_called_as_it_is(device):
    called = []
    replayed = Replayed(lambda x: (called.append(1), x * float(x.sum()))[1])
    for value in (1.0, 2.0, 3.0):
        times = len(called)
        found = replayed(torch.full((2,), value, device=device))
        assert found.tolist() == [2 * value**2] * 2 and len(called) > times
    if device == "cuda":
        assert torch.cuda.get_sync_debug_mode() == 0


@pytest.mark.parametrize("device", CAPTURING, indirect=True)
def test_numbers_keep_the_value_of_the_capture_and_tensors_are_read_anew(device):
    """What a capture must not depend on, and what it may."""
    number, tensor = [1.0], torch.ones(2, device=device)
    replayed = Replayed(lambda x: x * number[0] * tensor)
    given = torch.ones(2, device=device)
    assert replayed(given).tolist() == [1, 1]
    number[0] = 5.0
    tensor.fill_(2.0)
    assert replayed(given).tolist() == [2, 2]
