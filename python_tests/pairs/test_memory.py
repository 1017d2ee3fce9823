"""How many samples go through a base at once."""

import pytest
import torch
from cases import LINEAR, proxy_set, target_of, tiny_base
from torch import nn

from r2f_ext.models import load_base
from r2f_ext.pairs import GeneratedPairs, SimulatedPairs, Training, generate, memory
from r2f_ext.pairs.memory import sample_bytes
from r2f_ext.types import AdaptedLayer, BaseModel, Target


def test_a_sample_of_a_model_counted_by_hand():
    """x -> first (adapted) -> GELU -> last: GELU keeps its input, cross-entropy its log-probabilities."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 30), nn.GELU(), nn.Linear(30, 5)).requires_grad_(False)
    base = BaseModel(model, "toy", (3, 4, 4), (0.5,) * 3, (0.5,) * 3, 5)
    found = sample_bytes(Target(base, (AdaptedLayer("1", 30, 48, 4, 1.0),)))
    assert found.factors == 4 * (48 + 30)
    assert 0 <= found.in_pass - found.factors - 4 * (30 + 5) <= 64  # the loss keeps a few scalars and the label


def test_factors_are_counted_exactly():
    base = tiny_base(torch.float32)
    target = target_of(base, LINEAR)
    (batch,) = GeneratedPairs(
        target, {n: torch.randn(4, target.layer(n).d_in) for n in LINEAR}, proxy_set(2, base)
    ).batches()
    tensors = [*batch.gradients.x.values(), *batch.gradients.delta.values()]
    found = sample_bytes(target)
    assert found.factors == sum(t.numel() * 4 for t in tensors) / 2 and found.in_pass > found.factors


def test_passes_shrink_with_the_budget(monkeypatch):
    base = tiny_base(torch.float32)
    target, proxy = target_of(base, LINEAR), proxy_set(400, base)
    a = {name: torch.randn(4, target.layer(name).d_in) for name in LINEAR}
    cost = sample_bytes(target)
    assert GeneratedPairs(target, a, proxy).batch_groups == 100
    monkeypatch.setattr(memory, "CPU_BYTES", 12 * cost.in_pass)
    assert GeneratedPairs(target, a, proxy).batch_groups == 12
    assert GeneratedPairs(target, a, proxy, group_size=5).batch_groups == 2
    assert [len(b.labels) for b in GeneratedPairs(target, a, proxy).batches(0, 30)] == [12, 12, 6]
    kept = 12 * cost.in_pass // (cost.factors * 10)
    assert SimulatedPairs(target, a, proxy, Training(steps=10)).batch_groups == min(12, kept)
    monkeypatch.setattr(memory, "CPU_BYTES", 1)
    assert GeneratedPairs(target, a, proxy).batch_groups == 1  # it must go on somehow


def test_dense_averages_do_not_grow_with_the_steps():
    base = tiny_base(torch.float32)
    target, proxy = target_of(base, LINEAR), proxy_set(4, base)
    a = {name: torch.randn(4, target.layer(name).d_in) for name in LINEAR}
    long = Training(steps=10**6)
    assert SimulatedPairs(target, a, proxy, long).batch_groups == 1
    assert SimulatedPairs(target, a, proxy, long, dense=True).batch_groups == 100


def test_a_file_holds_a_pass_but_no_more_gradients_than_fit(monkeypatch):
    base = tiny_base(torch.float32)
    target, proxy = target_of(base, LINEAR), proxy_set(400, base)
    a = {name: torch.randn(4, target.layer(name).d_in) for name in LINEAR}
    pairs = GeneratedPairs(target, a, proxy)
    assert pairs.shard_groups == pairs.batch_groups == 100
    stored = sample_bytes(target).factors // 2
    monkeypatch.setattr(generate, "SHARD_BYTES", 7 * stored)
    assert pairs.shard_groups == 7 and pairs.batch_groups == 100
    assert SimulatedPairs(target, a, proxy, Training(steps=3)).shard_groups == 2
    assert [len(batch.labels) for batch in pairs.batches(7, 14)] == [7]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_takes_thousands_of_samples_and_proxies_live_there():
    base = load_base(device="cuda")
    target = target_of(base, ["blocks.0.attn.qkv"])
    a = {"blocks.0.attn.qkv": torch.randn(4, 128, device="cuda")}
    pairs = GeneratedPairs(target, a, proxy_set(5000, base))
    assert pairs.batch_groups >= 1000
    assert all(batch.images.is_cuda for batch in pairs.batches(0, 2)) and pairs._samples.images.is_cuda
