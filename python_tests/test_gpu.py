"""Switches and sizes of a GPU; what they do to PyTorch's state can be seen on a CPU as well."""

import subprocess
import sys
from types import SimpleNamespace
from typing import ClassVar

import psutil
import pytest
import torch
from route_cases import posed
from vit_cases import small_vit, smooth_images

from r2f_ext.audit.phase0 import phase0
from r2f_ext.data import ImageSet
from r2f_ext.errors import R2FError
from r2f_ext.gpu import float32_products, free_memory, seeded
from r2f_ext.inversion.routes import run_routes, verdicts_of


def flags() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture
def as_if_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_products_and_convolutions_are_in_float32_or_in_tf32_and_as_before_afterwards(as_if_on_a_gpu):
    assert flags() == (False, True)  # PyTorch's defaults
    with float32_products():
        assert flags() == (False, False)
        with float32_products(tf32=True):
            assert flags() == (True, True)
        assert flags() == (False, False)
    with pytest.raises(R2FError), float32_products():
        raise R2FError("any")
    assert flags() == (False, True)


def test_without_a_gpu_no_flag_is_touched(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with float32_products():
        assert flags() == (False, True)


SETTINGS = {
    "medium": "torch.set_float32_matmul_precision('medium')",
    "matmul": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "convolutions": "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    "all": "torch.backends.fp32_precision = 'ieee'",
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_users_own_settings_come_back(setting):
    """In a process of its own, because some settings cannot be taken back."""
    code = f"""if True:
        import torch
        from r2f_ext.gpu import float32_products
        torch.cuda.is_available = lambda: True
        {SETTINGS[setting]}
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        def seen():
            try:
                older = torch.get_float32_matmul_precision()
            except RuntimeError:
                older = None
            return [kind.fp32_precision for kind in (matmul, cudnn.conv, cudnn.rnn)], older
        before = seen()
        with float32_products():
            assert matmul.fp32_precision != "tf32" != cudnn.conv.fp32_precision, seen()
            with float32_products(tf32=True):
                assert matmul.fp32_precision == cudnn.conv.fp32_precision == "tf32", seen()
        assert seen() == before, (seen(), before)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class _Seen(torch.autograd.Function):
    """The identity; records the flags when its gradient, and the gradient of that, are computed."""

    record: ClassVar[list[tuple[bool, bool]]] = []

    @staticmethod
    def forward(ctx, x):
        _Seen.record.append(flags())
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return _Seen.apply(grad)


def test_routes_run_without_tf32_up_to_their_double_backward(as_if_on_a_gpu):
    problem, _ = posed()
    _Seen.record.clear()
    with problem.base.model.patch_embed.proj.register_forward_hook(lambda module, args, output: _Seen.apply(output)):
        run_routes(problem, verdicts_of(problem), ["amortised_refined"])
    assert len(_Seen.record) > 4 and set(_Seen.record) == {(False, False)} and flags() == (False, True)


def test_exact_gradients_are_computed_without_tf32(as_if_on_a_gpu):
    base, images = small_vit(torch.float32), smooth_images(2, 16)
    private = ImageSet("two", (images * 255).to(torch.uint8), torch.tensor([0, 1]))
    _Seen.record.clear()
    with base.model.patch_embed.proj.register_forward_hook(lambda module, args, output: _Seen.apply(output)):
        phase0(base, private)
    assert len(_Seen.record) > 2 and set(_Seen.record) == {(False, False)}


def test_random_numbers_are_seeded_in_the_context_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with seeded(8):
        first = torch.rand(4)
    assert torch.equal(torch.rand(4), expected)
    with seeded(8):
        assert torch.equal(torch.rand(4), first) and not torch.equal(first, expected)


def test_a_gpus_own_memory_is_what_is_free(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=7))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2)
    assert free_memory(torch.device("cpu")) == 7
    assert free_memory(torch.device("cuda:1")) == 33
