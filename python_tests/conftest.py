"""What all tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import victim

from r2f_ext.data import ImageSet, load_images
from r2f_ext.models import attach, load_base, read_adapter
from r2f_ext.pairs import GeneratedPairs
from r2f_ext.types import BaseModel, LoraUpdate, Target


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each test that takes this fixture runs on the CPU and, where there is one, on the GPU."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def embedded() -> BaseModel:
    return load_base("embedded")


@pytest.fixture(scope="session")
def private() -> ImageSet:
    """Three private images."""
    return load_images("embedded", role="private", count=3)


@pytest.fixture(scope="session")
def adapter_folder(tmp_path_factory: pytest.TempPathFactory, embedded: BaseModel, private: ImageSet) -> Path:
    """One PEFT victim of the first private image, qkv only: r = 8, alpha = 16, T = 1. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("victims") / "one"
    return victim(embedded, folder, private.batch([0]), private.labels[:1])


@pytest.fixture(scope="session")
def bound(adapter_folder: Path, embedded: BaseModel) -> tuple[Target, LoraUpdate]:
    """The same adapter, attached to its base."""
    return attach(read_adapter(adapter_folder), embedded)


@pytest.fixture(scope="session")
def proxy() -> ImageSet:
    return load_images("embedded", count=160)


@pytest.fixture(scope="session")
def pairs(bound: tuple[Target, LoraUpdate], proxy: ImageSet) -> GeneratedPairs:
    """160 pairs at the adapter's own start."""
    return GeneratedPairs(bound[0], bound[1].a, proxy)
