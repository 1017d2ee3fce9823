"""Each sentence on the training is said where its cause holds, of adapters that PEFT makes, and not elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import changed_weights, peft_factors, peft_model, samples, save, tiny_base, train
from peft import EvaConfig, initialize_lora_eva_weights
from torch import Tensor, nn

from r2f_ext.models import AdapterFacts, Evidence, attach, evidence_of, read_adapter
from r2f_ext.models.draws import Trace
from r2f_ext.models.evidence import NO_BATCH, NO_RECIPE, SHOWN, START_MOVES_A, UNCHANGED, constant_share
from r2f_ext.types import BaseModel, LoraUpdate

LAYERS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return tiny_base(torch.float32)


def update_of(model: nn.Module) -> LoraUpdate:
    """The factors of a PEFT model as they are."""
    names = [name for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")]
    factors = {name: peft_factors(model, name) for name in names}
    a, b = ({name: each[i].clone() for name, each in factors.items()} for i in (0, 1))
    return LoraUpdate(a, b)


def trained(base: BaseModel, steps: int = 1, lr: float = 0.1, batch: int = 1, **lora) -> LoraUpdate:
    model = peft_model(base, target_modules=LAYERS, **lora)
    train(model, base, *samples(batch, base, torch.float32), lr=lr, steps=steps)
    return update_of(model)


def adamw(base: BaseModel, steps: int, lr: float = 1e-3, **options) -> LoraUpdate:
    model = peft_model(base, target_modules=LAYERS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, **options)
    images, labels = samples(2, base, torch.float32)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(base.normalize(images)), labels).backward()
        optimizer.step()
    return update_of(model)


def facts(init: str) -> tuple[AdapterFacts, ...]:
    return (AdapterFacts("a", init=init),)


def changed(update: LoraUpdate, change) -> LoraUpdate:
    return replace(update, a={name: change(a) for name, a in update.a.items()})


def first(found: Evidence) -> str:
    """The sentence on A; the one on the batch always ends them."""
    assert found.sentences[-1] == NO_BATCH and len(set(found.sentences)) == len(found.sentences)
    assert all(sentence[0].isupper() and sentence.endswith(".") for sentence in found.sentences)
    return found.sentences[0]


@pytest.mark.parametrize("batch", [1, 4])
def test_one_plain_step(base, batch):
    """Four images leave the same mark as one: only the caveat says so."""
    found = evidence_of([trained(base, batch=batch)])
    assert (found.steps, found.start, found.signs_only) == (1, "default", False)
    assert found.sentences == (SHOWN["default", Trace.NONE], NO_BATCH)


def test_several_plain_steps(base):
    found = evidence_of([trained(base), trained(base, steps=20, lr=2.0)])
    assert found.steps is None and not found.signs_only and len(found.sentences) == 2
    assert first(found).startswith("A has left PEFT's initial range in ") and first(found).endswith(NO_RECIPE)
    assert " of 16 layers" in first(found)


def test_small_movements_are_said_to_be_possible(base):
    small = evidence_of([trained(base, steps=2, lr=1e-3)])
    assert small.steps == 1 and first(small) == SHOWN["default", Trace.POSSIBLE]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_storage_is_no_second_step(adapter_folder, embedded, tmp_path, dtype):
    folder = changed_weights(adapter_folder, tmp_path / "a", lambda w: {n: t.to(dtype) for n, t in w.items()})
    _, update = attach(read_adapter(folder), embedded)
    found = evidence_of([update])
    assert update.stored is dtype and found.steps == 1 and first(found) == SHOWN["default", Trace.POSSIBLE]


def test_a_file_in_full_precision(bound):
    assert bound[1].stored is torch.float32 and first(evidence_of([bound[1]])) == SHOWN["default", Trace.NONE]


def test_the_gaussian_start_is_judged_by_its_own_draws(embedded):
    one = trained(embedded, init_lora_weights="gaussian")
    found = evidence_of([one], facts("gaussian"))
    assert (found.steps, found.start, first(found)) == (1, "gaussian", SHOWN["gaussian", Trace.NONE])
    rounded = evidence_of([changed(one, lambda a: a.bfloat16().float())], facts("gaussian"))
    assert rounded.steps is None and first(rounded) == SHOWN["gaussian", Trace.POSSIBLE]
    several = trained(embedded, steps=3, init_lora_weights="gaussian")
    found = evidence_of([several], facts("gaussian"))
    assert found.steps is None and first(found) == SHOWN["gaussian", Trace.POSSIBLE]
    scaled = evidence_of([changed(one, lambda a: 1.5 * a)], facts("gaussian"))
    assert scaled.steps is None and first(scaled) == SHOWN["gaussian", Trace.MOVED]
    assert evidence_of([one]).steps is None  # it is no default start


def test_a_known_start_decides(base):
    one, several = (trained(base, steps=steps, init_lora_weights="gaussian") for steps in (1, 3))
    several = replace(several, a0=one.a)
    same = replace(changed(one, lambda a: a.bfloat16().float()), a0=one.a)
    shrunk = replace(changed(one, lambda a: a * (1 - 1e-5)), a0=one.a)
    for update, trace in ((same, Trace.NONE), (shrunk, Trace.NONE), (several, Trace.MOVED)):
        found = evidence_of([update], facts("gaussian"))
        assert (found.start, first(found)) == ("known", SHOWN["known", trace])
        assert found.steps == (1 if trace is Trace.NONE else None)
    grown = evidence_of([replace(changed(one, lambda a: a * 1.001), a0=one.a)])
    assert grown.steps is None
    assert evidence_of([several, one], facts("gaussian")).start == "gaussian"  # known of one only


def test_adamws_first_step_holds_signs(base):
    found = evidence_of([adamw(base, 1)])
    assert found.steps == 1 and found.signs_only and "of the entries of |B| equal the largest" in found.sentences[1]
    assert first(found) == SHOWN["default", Trace.POSSIBLE]  # decay has shrunk A a little
    plain = evidence_of([adamw(base, 1, weight_decay=0.0)])
    assert plain.signs_only and first(plain) == SHOWN["default", Trace.NONE]


def test_adamws_later_steps_and_sgd_hold_more_than_signs(base):
    later = evidence_of([adamw(base, 20, lr=1e-2)])
    assert later.steps is None and not later.signs_only and len(later.sentences) == 2
    for update in (trained(base), trained(base, batch=4), trained(base, steps=5)):
        assert constant_share(update.b) < 0.01
    assert constant_share({"few": torch.ones(4, 4)}) == constant_share({"none": torch.zeros(40, 4)}) == 0
    assert constant_share({"lion": torch.randn(40, 4).sign()}) > 0.99
    mixed = evidence_of([adamw(base, 1), trained(base)])
    assert mixed.signs_only and mixed.sentences[1].startswith("In 1 of 2 adapters 99 % or more of the entries")


def test_adamw_is_known_where_some_gradients_are_near_its_eps():
    gradient = 10 ** -(5 + 5 * torch.rand(96, 8, dtype=torch.float64)) * torch.randn(96, 8).sign()
    b = -1e-3 * gradient / (gradient.abs() + 1e-8)
    assert 0.1 < constant_share({"layer": b.float()}) < 0.5 and constant_share({"layer": gradient.float()}) < 0.01


def test_zeros_in_a_are_named_for_what_they_are(base):
    one = trained(base)

    def without(rows: slice, columns: slice):
        def change(a: Tensor) -> Tensor:
            a = a.clone()
            a[rows, columns] = 0
            return a

        return change

    halves = (slice(0, 4), slice(None)), (slice(None), slice(0, 12))
    for part in halves:
        found = evidence_of([changed(one, without(*part))])
        assert found.steps == 1 and "In 8 of 8 layers entries of A are exactly 0" in found.sentences[1]
        assert first(found) == SHOWN["default", Trace.NONE]
    empty = changed(one, torch.zeros_like)
    found = evidence_of([empty])
    assert "(100 % of " in found.sentences[1] and first(found) == SHOWN["default", Trace.POSSIBLE]
    assert not any("exactly 0" in sentence for sentence in evidence_of([one]).sentences)


def test_decay_that_removed_the_start(base):
    low = changed(trained(base), lambda a: 1e-5 * a + torch.randn(len(a), 1) @ torch.randn(1, a.shape[1]) / 50)
    found = evidence_of([low])
    assert found.steps is None and first(found).startswith("In 8 of 8 layers A lacks the small singular values")


def test_an_unchanged_adapter_is_not_called_safe(base):
    found = evidence_of([update_of(peft_model(base))])
    assert found.sentences == (UNCHANGED,) and found.steps is None and "safe" in UNCHANGED


def test_evas_start_is_not_held_against_the_default_range(base):
    model = peft_model(base, target_modules=LAYERS, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    images = samples(64, base, torch.float32)[0]
    loader = [{"x": base.normalize(part)} for part in images.split(16)]
    initialize_lora_eva_weights(model, loader, forward_fn=lambda wrapped, batch: wrapped(batch["x"]),
                                prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None)  # fmt: skip
    train(model, base, *samples(1, base, torch.float32))
    one = update_of(model)
    found = evidence_of([one], facts("eva"))
    assert (found.steps, found.start, first(found)) == (1, "eva", SHOWN["eva", Trace.POSSIBLE])
    moved = evidence_of([changed(one, lambda a: a + 0.01 * torch.randn_like(a))], facts("eva"))
    assert moved.steps is None and first(moved) == SHOWN["eva", Trace.MOVED]
    assert evidence_of([one]).steps is None


def test_noise_and_foreign_factors_are_not_called_one_step(base):
    """Gaussian A and B, and the SVD of a weight difference."""
    one = trained(base)
    noise = LoraUpdate(*({n: torch.randn_like(t) for n, t in part.items()} for part in (one.a, one.b)))
    assert evidence_of([noise]).steps is None
    svd = {n: torch.linalg.svd(torch.randn(32, a.shape[1]), full_matrices=False)[2][:8] for n, a in one.a.items()}
    assert evidence_of([replace(one, a=svd)]).steps is None
    assert START_MOVES_A not in evidence_of([noise]).sentences


def test_a_saved_and_read_adapter_gives_the_same_evidence(base, tmp_path):
    model = peft_model(base)
    train(model, base, *samples(1, base, torch.float32))
    _, update = attach(read_adapter(save(model, tmp_path / "a")), base)
    assert evidence_of([update]) == evidence_of([update_of(model)])
