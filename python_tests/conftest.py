"""Fixtures that all tests share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cases import victim
from cli_cases import run

from r2f_ext.audit import AuditResult, controls, run_audit_stages
from r2f_ext.config import AuditConfig
from r2f_ext.data import ImageSet, load_images
from r2f_ext.inversion.matching import MatchingConfig
from r2f_ext.inversion.route import adapter_problem
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


@pytest.fixture(scope="module")
def few_controls() -> Iterator[None]:
    """Simulated controls are as few as a rank test at 5 % allows: they take most of a small audit's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(controls, "SIMULATED", controls.LEAST)
        yield


@dataclass(frozen=True)
class Audited:
    """A small audit of three real victims of one start, and all that went into it."""

    target: Target
    adapters: list[LoraUpdate]
    proxy: ImageSet
    private: ImageSet
    config: AuditConfig
    result: AuditResult


@pytest.fixture(scope="session")
def audited(
    tmp_path_factory: pytest.TempPathFactory, embedded: BaseModel, private: ImageSet, proxy: ImageSet
) -> Audited:
    folder = tmp_path_factory.mktemp("audited")
    adapters = []
    for i in range(len(private)):
        path = victim(embedded, folder / str(i), private.batch([i]), private.labels[i : i + 1])
        target, update = attach(read_adapter(path), embedded)
        adapters.append(update)
    steps = MatchingConfig(steps=3)
    config = AuditConfig(pairs=120, decoder_pairs=90, held_out=20, matching=steps, refinement=steps)
    problem = adapter_problem(target, adapters)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(controls, "SIMULATED", controls.LEAST)
        result = run_audit_stages(problem, proxy, config)
    return Audited(target, adapters, proxy, private, config, result)


@dataclass(frozen=True)
class Stages:
    """Folders of `r2f pairs`, `r2f fit` and `r2f decode` for the adapter of `adapter_folder`. Copy before changing."""

    adapter: Path
    pairs: Path
    decoders: Path
    gradients: Path


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory, adapter_folder: Path) -> Stages:
    folder = tmp_path_factory.mktemp("stages")
    done = Stages(adapter_folder, folder / "p", folder / "d", folder / "g" / "gradients.safetensors")
    assert run("pairs", done.adapter, "--count", 40, "--proxy", "embedded", "--out", done.pairs) == 0
    assert run("fit", done.pairs, "--out", done.decoders) == 0
    decode = ("decode", done.adapter, "--pairs", done.pairs, "--decoders", done.decoders)
    assert run(*decode, "--out", done.gradients.parent) == 0
    return done
