"""A_0 found again, against PEFT's own draws."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import changed_weights, peft_factors, peft_model, save, train, victim

from r2f_ext.errors import R2FError
from r2f_ext.models import attach, initial_from_folder, initial_from_seed, read_adapter

MODULES = ["patch_embed.proj", "attn.qkv", "mlp.fc1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, embedded, private):
    """An adapter of three steps under seed 5, its folder before training, and PEFT's own A_0."""
    folder = tmp_path_factory.mktemp("initial")
    options = {"target_modules": MODULES, "modules_to_save": ["head"], "rank_pattern": {"mlp.fc1": 4}}
    model = peft_model(embedded, seed=5, **options)
    start = {}
    save(model, folder / "start")
    names = [name for name, _ in embedded.model.named_modules() if name.endswith(tuple(MODULES))]
    for name in names:
        start[name] = peft_factors(model, name)[0].clone()
    train(model, embedded, private.batch([0]), private.labels[:1], steps=3)
    target, update = attach(read_adapter(save(model, folder / "end")), embedded)
    return target, update, folder, start


def test_the_seed_is_found_and_every_layer_drawn_as_peft_drew_it(trained):
    target, update, _, start = trained
    found = initial_from_seed(target, update, range(8))
    assert found is not None and "manual_seed(5)" in found.source and 0.9 < found.cosine < 1
    assert found.a.keys() == start.keys()
    for name, a in found.a.items():
        assert torch.equal(a, start[name]) and not torch.equal(a, update.a[name])


def test_the_callers_random_numbers_stay_as_they_were(trained):
    target, update, _, _ = trained
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    initial_from_seed(target, update, [0])
    assert torch.equal(torch.rand(1), expected)


def test_gaussian_starts_are_tried_too(embedded, private, tmp_path):
    folder = victim(embedded, tmp_path / "g", private.batch([0]), private.labels[:1], init_lora_weights="gaussian")
    target, update = attach(read_adapter(folder), embedded)
    found = initial_from_seed(target, update, [3, 0])
    assert found is not None and "manual_seed(0)" in found.source
    assert all(torch.equal(found.a[name], update.a[name]) for name in update.a)


def test_other_seeds_are_not_taken_for_it(trained):
    target, update, _, _ = trained
    assert initial_from_seed(target, update, range(5)) is None


def test_a_folder_saved_before_training(trained):
    target, update, folder, start = trained
    found = initial_from_folder(folder / "start", target, update)
    assert str(folder / "start") in found.source
    assert all(torch.equal(a, start[name]) for name, a in found.a.items())


def test_folders_that_are_no_start_are_refused(trained, embedded, tmp_path):
    target, update, folder, _ = trained
    with pytest.raises(R2FError, match="has no adapter_model"):
        initial_from_folder(tmp_path, target, update)
    fewer = changed_weights(folder / "start", tmp_path / "fewer", lambda w: dict(list(w.items())[-1:]))
    with pytest.raises(R2FError, match="holds no A of"):
        initial_from_folder(fewer, target, update)
    other = replace(update, a={name: torch.rand_like(a) - 0.5 for name, a in update.a.items()})
    with pytest.raises(R2FError, match="not where this adapter started"):
        initial_from_folder(folder / "start", target, other)
