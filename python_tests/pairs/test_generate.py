"""Updates against what one step of PEFT's own training leaves in B."""

import pytest
import torch
from cases import (
    CONV,
    LINEAR,
    cosine,
    peft_factors,
    peft_model,
    proxy_set,
    samples,
    target_and_a,
    target_of,
    tiny_base,
    train,
)

from r2f_ext.capture import Capture
from r2f_ext.capture.project import project
from r2f_ext.data import ProceduralStream
from r2f_ext.errors import R2FError
from r2f_ext.models import load_base
from r2f_ext.pairs import GeneratedPairs, SimulatedPairs, Training, generate
from r2f_ext.types import FactoredGradient

LR = 0.1
BLOCKS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
LORAS = {
    "r 8, alpha 16": {"r": 8, "lora_alpha": 16},
    "rank 4, alpha 32": {"r": 4, "lora_alpha": 32},
    "rsLoRA": {"r": 8, "lora_alpha": 16, "use_rslora": True},
    "convolution": {"target_modules": [CONV, "mlp.fc1"]},
}


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS.keys())
def test_an_update_is_minus_b_over_lr_of_a_real_victim(lora, size):
    base = tiny_base()
    images, labels = samples(size, base)
    model = peft_model(base, **{"target_modules": BLOCKS, **lora})
    target, a0 = target_and_a(base, model)
    train(model, base, images, labels, lr=LR)
    with Capture(target) as capture:
        updates = project(target, capture(images[None], labels[None]), a0)
    for layer in target.layers:
        a, b, _ = peft_factors(model, layer.name)
        assert torch.equal(a, a0[layer.name])
        torch.testing.assert_close(-LR * updates[layer.name][0], b, rtol=1e-6, atol=1e-12)
        assert b.any()


def test_the_victims_of_a_pass_are_prepared_before_the_last_one_is_handed_over(monkeypatch):
    """The host then prepares them while a GPU computes."""
    monkeypatch.setattr(generate, "BATCH_GROUPS", 2)
    base = tiny_base(torch.float32)
    target = target_of(base, LINEAR)
    a = {layer.name: torch.randn(layer.rank, layer.d_in) for layer in target.layers}
    pairs, prepared = GeneratedPairs(target, a, proxy_set(5, base)), []
    prepare = pairs._victims
    monkeypatch.setattr(pairs, "_victims", lambda *one: (prepared.append(one), prepare(*one))[1])
    seen = [(len(batch.labels), len(prepared)) for batch in pairs.batches()]
    assert seen == [(2, 2), (2, 3), (1, 3)] and prepared == [(0, 2), (2, 2), (4, 1)]
    assert list(pairs.batches(3, 3)) == []


def test_pairs_of_a_proxy_are_victims_of_its_images(bound, embedded, proxy):
    """End to end in float32: pair i is the victim whose batch is samples 2i and 2i + 1."""
    target, update = bound
    pairs = GeneratedPairs(target, update.a, proxy.take(torch.arange(7)), group_size=2)
    assert len(pairs) == 3
    (batch,) = pairs.batches()
    for i in range(3):
        rows = torch.tensor([2 * i, 2 * i + 1])
        assert torch.equal(batch.images[i], proxy.batch(rows)) and torch.equal(batch.labels[i], proxy.labels[rows])
        model = peft_model(embedded)
        train(model, embedded, proxy.batch(rows), proxy.labels[rows], lr=LR)
        for name in target.names:
            a, b, _ = peft_factors(model, name)
            assert torch.equal(a, update.a[name])
            torch.testing.assert_close(-LR * batch.updates[name][i], b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def test_victims_with_their_own_a():
    """One step of PEFT's own training from each a0."""
    base = tiny_base(torch.float32)
    target, proxy = target_of(base, LINEAR, rank=8), proxy_set(4, base)
    (batch,) = GeneratedPairs(target, {}, proxy, group_size=2, per_victim_a=1).batches()
    assert batch.a is None
    for victim in range(2):
        model = peft_model(base, target_modules=list(LINEAR))
        for name in LINEAR:
            model.base_model.model.get_submodule(name).lora_A["default"].weight.data.copy_(batch.a0[name][victim])
        rows = torch.tensor([2 * victim, 2 * victim + 1])
        train(model, base, proxy.batch(rows), proxy.labels[rows], lr=LR)
        for name in LINEAR:
            a, b, _ = peft_factors(model, name)
            assert torch.equal(a, batch.a0[name][victim])
            torch.testing.assert_close(
                -LR * batch.updates[name][victim], b, rtol=1e-3, atol=1e-4 * float(b.abs().max())
            )


def test_batches_are_slices_of_one_walk(monkeypatch, pairs):
    monkeypatch.setattr(generate, "BATCH_GROUPS", 160)
    (whole,) = pairs.batches()
    monkeypatch.setattr(generate, "BATCH_GROUPS", 7)
    parts = list(pairs.batches(30, 60))
    assert [len(part.labels) for part in parts] == [7, 7, 7, 7, 2]
    name = pairs.target.names[-1]
    for read in (lambda p: p.images, lambda p: p.labels, lambda p: p.updates[name], lambda p: p.gradients.x[name]):
        torch.testing.assert_close(torch.cat([read(p) for p in parts]), read(whole)[30:60], rtol=1e-3, atol=1e-5)
    assert sum(len(part.labels) for part in pairs.batches(150, 999)) == 10


def test_a_proxy_of_one_pair_is_refused():
    base = tiny_base(torch.float32)
    target = target_of(base, LINEAR)
    with pytest.raises(R2FError, match=r"'noise' has 3 images: at least 4"):
        GeneratedPairs(target, {}, proxy_set(3, base), group_size=2)


def test_bfloat16_pairs_are_the_float32_ones_to_four_digits(bound, proxy):
    target, update = bound
    few = proxy.take(torch.arange(32))
    (exact,), (rounded,) = (
        GeneratedPairs(target, update.a, few, precision=precision).batches() for precision in ("float32", "bfloat16")
    )
    for name in target.names:
        assert rounded.updates[name].dtype == rounded.gradients.x[name].dtype == torch.float32
        for got, expected in (
            (rounded.updates[name], exact.updates[name]),
            (rounded.gradients.dense(name), exact.gradients.dense(name)),
        ):
            assert not torch.equal(got, expected)
            assert cosine(got.flatten(1), expected.flatten(1)).mean() >= 0.9995


def test_an_unknown_precision_is_refused(bound, proxy):
    with pytest.raises(R2FError, match="unknown precision 'float16': choose float32 or tf32 or bfloat16"):
        GeneratedPairs(bound[0], bound[1].a, proxy, precision="float16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_tf32_is_refused_on_a_cpu(bound, proxy):
    with pytest.raises(R2FError, match="tf32 is a precision of GPUs, and the base is on 'cpu'"):
        GeneratedPairs(bound[0], bound[1].a, proxy, precision="tf32")
    with pytest.raises(R2FError, match="tf32 is a precision of GPUs"):
        SimulatedPairs(bound[0], bound[1].a, proxy, Training(steps=2), precision="tf32")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("precision", "least"), [("tf32", 0.99999), ("bfloat16", 0.999)])
def test_low_precisions_of_a_gpu_are_near_float32_and_leave_its_settings(precision, least):
    base = load_base(device="cuda")
    target = target_of(base, LINEAR)
    a = {name: torch.randn(4, target.layer(name).d_in, device="cuda") for name in LINEAR}
    proxy, before = proxy_set(64, base), torch.backends.cuda.matmul.allow_tf32
    (exact,), (low,) = (GeneratedPairs(target, a, proxy, precision=p).batches() for p in ("float32", precision))
    assert torch.backends.cuda.matmul.allow_tf32 is before
    assert not any(getattr(m, "fused_attn", False) for m in base.model.modules())
    for name in target.names:
        assert not torch.equal(low.updates[name], exact.updates[name])
        found = cosine(low.updates[name].flatten(1).double(), exact.updates[name].flatten(1).double())
        assert least < found.mean() < 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_passes_of_a_gpu_do_not_wait_for_it_and_repeat_to_the_bit(precision, monkeypatch):
    base = load_base(device="cuda")
    target = target_of(base, LINEAR)
    a = {name: torch.randn(4, target.layer(name).d_in, device="cuda") for name in LINEAR}
    monkeypatch.setattr(generate, "GPU_SAMPLES", 128)
    stream = ProceduralStream(400, base.input_shape, base.num_classes, device="cuda")
    for proxy in (proxy_set(400, base), stream):
        pairs = GeneratedPairs(target, a, proxy, precision=precision)
        first = [batch.updates for batch in pairs.batches()]
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = [batch.updates for batch in pairs.batches()]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert [len(updates[LINEAR[0]]) for updates in again] == [128, 128, 128, 16]
        for one, other in zip(first, again, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in LINEAR)


def test_factors_in_bfloat16_are_read_in_float32_layer_by_layer():
    x, delta = ({"l": torch.randn(2, 3, 4).bfloat16()} for _ in range(2))
    found = FactoredGradient(x, delta).float32()
    assert found.x["l"].dtype == found.dense("l").dtype == torch.float32
    assert torch.equal(found.x["l"], x["l"].float()) and torch.equal(found.delta["l"], delta["l"].float())
    assert list(found.x) == ["l"] and len(found.delta) == 1 and found.x.tensors["l"] is x["l"]
