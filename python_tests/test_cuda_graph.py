"""Functions that are replayed: the same results as calls, on a GPU where there is one."""

import pytest
import torch

from r2f_ext.cuda_graph import Replayed

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_shape_is_captured_once_and_a_call_overwrites_the_last_results():
    called = []
    replayed = Replayed(lambda x: (called.append(1), x + 1)[1])
    first = replayed(torch.zeros(2, device="cuda"))
    times = len(called)
    second = replayed(torch.ones(2, device="cuda"))
    assert len(called) == times and second.tolist() == [2, 2] and first.tolist() == [2, 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_function_that_waits_for_the_device_is_called_as_it_is():
    called = []
    replayed = Replayed(lambda x: (called.append(1), x * float(x.sum()))[1])
    for value in (1.0, 2.0, 3.0):
        times = len(called)
        found = replayed(torch.full((2,), value, device="cuda"))
        assert found.tolist() == [2 * value**2] * 2 and len(called) > times
    assert torch.cuda.get_sync_debug_mode() == 0
