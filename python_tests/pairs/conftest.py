"""Pairs of a small base, in memory and on disk."""

import shutil

import pytest
import torch
from cases import LINEAR, proxy_set, target_of, tiny_base

from r2f_ext.pairs import GeneratedPairs, generate, write_pairs


@pytest.fixture(scope="session")
def made():
    base = tiny_base(torch.float32)
    target = target_of(base, LINEAR)
    a = {layer.name: torch.randn(layer.rank, layer.d_in) / 5 for layer in target.layers}
    return GeneratedPairs(target, a, proxy_set(25, base))


@pytest.fixture(scope="session")
def written(made, tmp_path_factory):
    """25 pairs, 10 in a shard."""
    folder = tmp_path_factory.mktemp("pairs") / "stored"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "BATCH_GROUPS", 10)
        write_pairs(made, 25, folder, lambda units: None)
    return folder


@pytest.fixture
def copied(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")
