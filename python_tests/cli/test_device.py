"""The device that --device selects."""

import pytest
import torch
from cli_cases import pairs_of, refused

from r2f_ext.cli.device import chosen_device, uses_cuda
from r2f_ext.cli.options import parse


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_here(adapter_folder, out, capsys):
    assert "use --device cpu" in refused(capsys, *pairs_of(adapter_folder, out), "--device", "cuda")


def device_of(*words):
    return chosen_device(parse(["phase0", "--out", "o", *words]))


@pytest.mark.parametrize("there", [True, False])
def test_auto_takes_the_gpu_where_there_is_one_and_cpu_leaves_it(there, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert device_of() == ("cuda" if there else "cpu")
    assert device_of("--device", "cpu") == "cpu"
    assert uses_cuda(parse(["phase0", "--out", "o"])) is there
    assert not uses_cuda(parse(["env"]))  # a command without --device
