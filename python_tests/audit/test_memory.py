"""Audits that do not fit into memory are cut or refused before any time is spent."""

import pytest
from torch import nn

from r2f_ext.audit import memory
from r2f_ext.audit.memory import fit_to_memory, start_images
from r2f_ext.config import AuditConfig
from r2f_ext.errors import R2FError
from r2f_ext.types import AdaptedLayer, BaseModel, Target

GIB = 1 << 30


@pytest.fixture
def large() -> Target:
    base = BaseModel(nn.Linear(1, 1), "large", (3, 224, 224), (0.0,) * 3, (1.0,) * 3, 10)
    return Target(base, tuple(AdaptedLayer(f"l{i}", 768, 3072, 8, 2.0) for i in range(12)))


def test_enough_memory_changes_nothing(large: Target) -> None:
    config = AuditConfig()
    assert fit_to_memory(large, 1, 300, config, free=200 * GIB) == config


def test_held_out_pairs_are_cut_first(large: Target) -> None:
    cut = fit_to_memory(large, 1, 300, AuditConfig(), free=8 * GIB)
    assert 4 <= cut.held_out < AuditConfig().held_out
    assert cut.pairs == AuditConfig().pairs


def test_refusal_names_a_count_that_fits(large: Target) -> None:
    with pytest.raises(R2FError, match=r"at most \d+ \(--count\)") as refused:
        fit_to_memory(large, 1, 100_000, AuditConfig(), free=16 * GIB)
    count = int(str(refused.value).split("at most ")[1].split()[0])
    fit_to_memory(large, 1, count, AuditConfig(), free=16 * GIB)


def test_hopeless_memory_is_refused(large: Target) -> None:
    with pytest.raises(R2FError, match="more memory"):
        fit_to_memory(large, 1, 100, AuditConfig(), free=GIB // 8)


def test_asks_the_bases_device_by_default(large: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit_to_memory(large, 1, 40, AuditConfig()).pairs == AuditConfig().pairs
    asked: list[object] = []
    monkeypatch.setattr(memory, "free_memory", lambda device: asked.append(device) or GIB // 8)
    with pytest.raises(R2FError, match="0 GB of memory"):
        fit_to_memory(large, 1, 100, AuditConfig())
    assert asked == [large.base.device]


def test_the_start_takes_as_many_images_of_a_label_as_fit_beside_the_pairs(large: Target) -> None:
    update, image = 4 * 12 * 768 * 8, 4 * 3 * 224 * 224
    assert start_images(large, 300, 500, free=200 * GIB) == 500
    fits = start_images(large, 300, 60_000, free=16 * GIB)
    needed = [300 * 2 * (update + image) + n * 2 * (update + image) + 12 * n**2 for n in (fits, fits + 1)]
    assert 1000 < fits < 60_000 and needed[0] <= 0.7 * 16 * GIB < needed[1]
    assert start_images(large, 300, 60_000, free=GIB // 8) == 0
    assert 0 < start_images(large, 40, 60_000) <= 60_000
