"""The device that --device selects."""

import pytest
import torch
from cli_cases import pairs_of, refused

from r2f_ext.cli.device import chosen_device, uses_cuda
from r2f_ext.cli.options import parse
from r2f_ext.errors import R2FError


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


def test_a_gpu_is_chosen_by_its_number_and_must_exist(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of("--device", "cuda:1") == "cuda:1"
    with pytest.raises(R2FError, match="cuda:2: GPUs are numbered from 0, and there are 2 here"):
        device_of("--device", "cuda:2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(R2FError, match="cuda:1 is one GPU, and torchrun started several processes: use --device cuda"):
        device_of("--device", "cuda:1")
    with pytest.raises(SystemExit):
        parse(["phase0", "--out", "o", "--device", "gpu"])
    assert "'gpu' is none of auto, cpu, cuda and cuda:N" in capsys.readouterr().err
