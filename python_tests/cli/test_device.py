"""The device that --device selects."""

import pytest
import torch
from cli_cases import pairs_of, refused


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_here(adapter_folder, out, capsys):
    assert "use --device cpu" in refused(capsys, *pairs_of(adapter_folder, out), "--device", "cuda")
