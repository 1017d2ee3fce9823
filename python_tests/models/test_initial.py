"""A_0 found again, against PEFT's own draws."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import changed_weights, peft_factors, peft_model, save, train, victim

from r2f_ext.errors import R2FError
from r2f_ext.inversion.route import adapter_problem
from r2f_ext.models import (
    InitialFactors,
    attach,
    common_a,
    differing_layer,
    initial_from_folder,
    initial_from_seed,
    read_adapter,
)
from r2f_ext.models import initial as module
from r2f_ext.types import LoraUpdate

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
    _, update, folder, start = trained
    found = initial_from_folder(folder / "start", update)
    assert found.source == "the folder 'start'"  # reports hold no absolute path
    assert all(torch.equal(a, start[name]) for name, a in found.a.items())


def test_folders_that_are_no_start_are_refused(trained, embedded, tmp_path):
    _, update, folder, _ = trained
    with pytest.raises(R2FError, match="has no adapter_model"):
        initial_from_folder(tmp_path, update)
    fewer = changed_weights(folder / "start", tmp_path / "fewer", lambda w: {n: t for n, t in w.items() if "proj" in n})
    with pytest.raises(R2FError, match="holds no A of"):
        initial_from_folder(fewer, update)
    other = replace(update, a={name: torch.rand_like(a) - 0.5 for name, a in update.a.items()})
    with pytest.raises(R2FError, match="not where this adapter started"):
        initial_from_folder(folder / "start", other)


def test_a_start_is_looked_for_once(trained, monkeypatch):
    target, update, folder, start = trained
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return initial_from_seed(*arguments)

    monkeypatch.setattr(module, "initial_from_seed", counted)
    initial = InitialFactors(target, update)
    assert not initial.named and calls == []
    for _ in range(2):
        assert initial.found is not None and torch.equal(initial.found.a[target.names[0]], start[target.names[0]])
    assert len(calls) == 1
    named = InitialFactors(target, update, folder / "start")
    assert named.named and named.found is not None and "start" in named.found.source
    with pytest.raises(R2FError, match="--a0-seed 77 does not draw"):
        _ = InitialFactors(target, update, seed=77).found


def test_one_tolerance_says_whether_a_is_the_same():
    a = {"one": torch.linspace(-1, 1, 12).view(3, 4), "two": torch.eye(3)}
    near, far = ({name: each + shift for name, each in a.items()} for shift in (0.009, 0.011))
    assert differing_layer(a, a) is differing_layer(a, near) is None
    assert differing_layer(a, far) == "one" and differing_layer(a, {**a, "two": torch.eye(4)}) == "two"
    assert differing_layer(a, {"one": a["one"]}) == differing_layer({"one": a["one"]}, a) == "two"
    small = {name: 1e-3 * each for name, each in a.items()}  # a share of the largest entry, whatever its size
    assert differing_layer(small, {name: each + 1e-4 for name, each in small.items()}) == "one"
    mean = common_a([LoraUpdate(a, {}), LoraUpdate(near, {})])
    torch.testing.assert_close(mean["two"], a["two"] + 0.0045)
    with pytest.raises(R2FError, match=r"A of one differs\): audit them one by one"):
        common_a([LoraUpdate(a, {}), LoraUpdate(far, {})])


def test_a_known_start_takes_the_place_of_a(trained):
    """From the file or named by the user: several adapters are still held against each other by what they are."""
    target, update, folder, start = trained
    own = replace(update, a0=start)
    found = InitialFactors(target, own).found
    assert found is not None and found.a is start and "own file" in found.source and 0.9 < found.cosine < 1
    assert all(torch.equal(update.start[name], a) for name, a in update.a.items())
    assert all(torch.equal(own.start[name], a) for name, a in start.items())
    assert all(torch.equal(common_a([own, own])[name], start[name]) for name in start)
    problem = adapter_problem(target, [update], InitialFactors(target, update, folder / "start"))
    assert problem.evidence is not None and (problem.evidence.start, problem.steps) == ("known", None)
    assert all(torch.equal(problem.a[name], start[name]) for name in start)
    stranger = replace(update, a={name: torch.rand_like(a) - 0.5 for name, a in update.a.items()})
    with pytest.raises(R2FError, match="audit them one by one"):
        adapter_problem(target, [update, stranger], InitialFactors(target, update, folder / "start"))
