"""Whole parameters saved with an adapter, against autograd and torch.optim."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import changed_weights, cosine, peft_model, samples, save, tiny_base, train
from torch import Tensor

from r2f_ext.audit import audit
from r2f_ext.config import AuditConfig
from r2f_ext.decoders import stack_updates, with_saved
from r2f_ext.errors import R2FError
from r2f_ext.inversion.matching import MatchingConfig
from r2f_ext.inversion.patch_position import invert_patch_position
from r2f_ext.inversion.route import adapter_problem
from r2f_ext.inversion.routes import verdicts_of
from r2f_ext.models import InitialFactors, attach, compare_saved, read_adapter
from r2f_ext.models.evidence import UNTRAINED
from r2f_ext.pairs import GeneratedPairs, Training, simulate
from r2f_ext.types import BaseModel, Gradient, LoraUpdate, Target

PREFIX = "base_model.model."
LR = 0.1


def gradient(base: BaseModel, images: Tensor, labels: Tensor, name: str) -> Tensor:
    """Autograd's own gradient of one parameter at the base's values."""
    parameter = base.model.get_parameter(name).requires_grad_(True)
    loss = F.cross_entropy(base.model(base.normalize(images)), labels)
    (found,) = torch.autograd.grad(loss, [parameter])
    parameter.requires_grad_(False)
    return found


def with_extra(folder: Path, to: Path, **values: Tensor) -> Path:
    """A copy of an adapter folder with whole parameters added; `__` stands for a dot."""
    named = {PREFIX + name.replace("__", "."): value.contiguous() for name, value in values.items()}
    return changed_weights(folder, to, lambda weights: {**weights, **named})


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return tiny_base()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, base: BaseModel) -> Path:
    """One step on one image, LoRA alone."""
    return trained(base, tmp_path_factory.mktemp("plain") / "a")


def trained(base: BaseModel, folder: Path, steps: int = 1, count: int = 1, **lora) -> Path:
    torch.manual_seed(1)
    images, labels = samples(count, base)
    model = peft_model(base, **lora).double()
    train(model, base, images, labels, lr=LR, steps=steps)
    return save(model, folder)


def bound(folder: Path, base: BaseModel) -> tuple[Target, LoraUpdate]:
    return attach(read_adapter(folder), base)


def victim_of(base: BaseModel, count: int = 1) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return samples(count, base)


@pytest.mark.parametrize(
    ("module", "layer"), [("patch_embed", "patch_embed.proj"), ("head", "head"), ("fc_norm", None), ("norm", None)]
)
def test_a_saved_module_is_the_exact_gradient_after_one_step(module, layer, base, tmp_path):
    folder = trained(base, tmp_path / "a", modules_to_save=[module])
    target, update = bound(folder, base)
    names = [name.removeprefix(PREFIX) for name in read_adapter(folder).saved]
    assert set(update.gradients) == set(names)
    for name in names:
        true = gradient(base, *victim_of(base), name)
        torch.testing.assert_close(update.gradients[name], LR * true, rtol=1e-8, atol=1e-12)
        assert float(cosine(update.gradients[name][None], true[None])) == pytest.approx(1.0, abs=1e-12)
    assert update.saved == ({layer} if layer else set())
    assert [one.name for one in target.layers if one.saved] == ([layer] if layer else [])
    for parameter, start in zip(target.base.model.parameters(), base.model.parameters(), strict=True):
        assert torch.equal(parameter, start)  # the gradient was taken at the base's values


def test_routes_read_it_as_a_layer_with_the_identity_for_a(base, tmp_path):
    target, update = bound(trained(base, tmp_path / "a", modules_to_save=["patch_embed"]), base)
    images, labels = victim_of(base)
    name = "patch_embed.proj"
    assert target.names[0] == name and torch.equal(update.a[name], torch.eye(48).double())
    simulated = simulate(target, update.a, images[None], labels[None], Training(lr=LR))
    for each in target.names:
        torch.testing.assert_close(simulated.b[each][0], update.b[each], rtol=1e-6, atol=1e-10)
    problem = adapter_problem(target, [update])
    assert problem.steps == 1 and problem.known_labels is None and problem.gradients is None
    lora = sum(one.rank * one.d_out for one in target.layers if not one.saved)
    assert verdicts_of(problem)["matching"].equations == lora + 16 * (24 + 48 - 16)  # a sum over 16 tokens
    decoded = Gradient({each: torch.zeros(1, 1) for each in target.names})
    exact = with_saved(target, stack_updates([update]), decoded).dense
    torch.testing.assert_close(exact[name][0], update.gradients[f"{name}.weight"].float().flatten(1))
    assert exact["blocks.0.attn.qkv"] is decoded.dense["blocks.0.attn.qkv"]


def test_the_identity_stays_in_a_training_of_several_steps(base, tmp_path):
    target, update = bound(trained(base, tmp_path / "a", steps=3, modules_to_save=["patch_embed"]), base)
    images, labels = victim_of(base)
    found = simulate(target, update.a, images[None], labels[None], Training(steps=3, lr=LR))
    assert torch.equal(found.a["patch_embed.proj"][0], torch.eye(48).double())


def test_rotations_of_the_tokens_leave_a_patch_gradient_as_it_is():
    """Why the gradient of a patch embedding alone is no closed form of the patches."""
    tokens, width, numbers = 16, 24, 48
    delta, patches = torch.randn(tokens, width).double(), torch.randn(tokens, numbers).double()
    rotation = torch.linalg.qr(torch.randn(tokens, tokens).double()).Q
    torch.testing.assert_close((rotation @ delta).mT @ (rotation @ patches), delta.mT @ patches)


@pytest.mark.parametrize("steps", [1, 3])
def test_with_the_positions_the_patches_follow_in_closed_form(steps, base, plain, tmp_path):
    """The patches are the same in every step of plain SGD, so sums of gradients serve as well as one."""
    images, labels = victim_of(base)
    model = tiny_base().model
    parts = [model.patch_embed.proj.weight, model.pos_embed]
    for parameter in parts:
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(parts, lr=LR)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(base.normalize(images)), labels).backward()
        optimizer.step()
    weight, positions = (parameter.detach() for parameter in parts)
    folder = with_extra(plain, tmp_path / "b", patch_embed__proj__weight=weight, pos_embed=positions)
    target, update = bound(folder, base)
    problem = adapter_problem(target, [update])
    assert problem.gradients is not None
    found = invert_patch_position(base, problem.gradients[0])
    assert float((found.images - images).abs().max()) < 1e-4
    assert verdicts_of(problem)["patch_position"].identifiable
    assert problem.shared == update.gradients.keys() == {"patch_embed.proj.weight", "pos_embed"}


def test_an_extra_weight_of_an_adapted_layer_takes_its_place(base, plain, tmp_path):
    name = "blocks.1.attn.qkv"
    true = gradient(base, *victim_of(base), f"{name}.weight")
    weight = base.model.get_parameter(f"{name}.weight") - LR * true
    folder = with_extra(plain, tmp_path / "b", blocks__1__attn__qkv__base_layer__weight=weight)
    target, update = bound(folder, base)
    assert target.names == ("blocks.0.attn.qkv", name) and target.layer(name).saved and target.layer(name).rank == 24
    torch.testing.assert_close(-update.b[name], LR * true, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"norm__weight": None}, "holds norm.weight as the base has it: it was not trained"),
        ({"other__weight": torch.ones(3)}, "holds other.weight, which the base does not have"),
        ({"norm__weight": torch.linspace(-1, 1, 24)}, "The start of norm.weight is not in the base"),
    ],
)
def test_what_is_no_gradient_is_said_to_be_none(values, words, base, plain, tmp_path):
    values = {name: base.model.get_parameter("norm.weight") if v is None else v for name, v in values.items()}
    folder = with_extra(plain, tmp_path / "b", **values)
    found = compare_saved(read_adapter(folder), base)
    assert words in found.notes[0] and not found.leaks and not found.gradients
    target, update = bound(folder, base)
    assert not update.gradients and not update.saved
    if found.stand_ins:
        assert torch.equal(target.base.model.norm.weight, values["norm__weight"].double())
        assert not torch.equal(base.model.norm.weight, target.base.model.norm.weight)


def test_rounding_of_the_storage_is_not_taken_for_a_gradient(base, plain, tmp_path):
    head = base.model.head.weight
    copied = with_extra(plain, tmp_path / "b", head__weight=head.bfloat16())
    assert "not trained" in compare_saved(read_adapter(copied), base).notes[0]
    nearly = head + 1e-4 * torch.randn_like(head)
    noisy = with_extra(plain, tmp_path / "c", head__weight=nearly.bfloat16())
    found = compare_saved(read_adapter(noisy), base)
    assert "within the rounding of bfloat16" in found.notes[0] and not found.layers and not found.leaks
    moved = 0.1 * torch.randn_like(head)
    half = with_extra(plain, tmp_path / "d", head__weight=(head + moved).half())
    found = compare_saved(read_adapter(half), base)
    error = float((found.change["head"] - moved).norm() / moved.norm())
    (said,) = re.findall(r"known to (\S+) of its size", found.leaks[-1])
    assert error / 3 < float(said) < 3 * error


def test_a_head_of_other_classes_stands_in_for_its_start(base, plain, tmp_path):
    torch.manual_seed(2)
    weight, bias = torch.randn(3, 24), torch.tensor([0.1, -0.2, 0.3])
    folder = with_extra(plain, tmp_path / "b", head__weight=weight, head__bias=bias)
    target, update = bound(folder, base)
    assert target.base.num_classes == 3 and target.base.model(torch.zeros(1, 3, 16, 16).double()).shape == (1, 3)
    assert not update.saved and base.model.head.weight.shape[0] == 5
    found = compare_saved(read_adapter(folder), base)
    assert "stands in" in found.notes[0] and "the classes 0 and 2 were trained on" in found.leaks[0]
    assert found.leaks[0].startswith("If the bias of the head in the file began at zero")


def test_a_head_that_training_changed_entirely_is_known_by_its_balance(tmp_path):
    base = tiny_base()
    base.model.head.weight.mul_(1e-6)
    folder = trained(base, tmp_path / "a", modules_to_save=["head"])
    assert bound(folder, base)[1].saved == {"head"}
    other = tiny_base()
    torch.manual_seed(9)
    other.model.head.weight.copy_(torch.randn(5, 24))
    assert bound(trained(tiny_base(), tmp_path / "b", modules_to_save=["head"]), other)[1].saved == frozenset()


def test_a_module_that_the_configuration_names_and_the_file_lacks_is_named(base, tmp_path):
    folder = trained(base, tmp_path / "a", modules_to_save=["head"])
    bare = changed_weights(folder, tmp_path / "b", lambda w: {k: v for k, v in w.items() if "head" not in k})
    (note,) = compare_saved(read_adapter(bare), base).notes
    assert note.startswith("The configuration names head as saved") and not bound(bare, base)[1].saved


def test_large_layers_are_left_to_their_factors(base, plain, tmp_path, monkeypatch):
    monkeypatch.setattr("r2f_ext.models.saved_modules.MAX_NUMBERS", 100)
    folder = trained(base, tmp_path / "a", modules_to_save=["head"])
    found = compare_saved(read_adapter(folder), base)
    assert not found.layers and "5 x 24 numbers are too many for a search" in found.leaks[-1]
    assert "head.weight" in found.gradients and found.label is not None


def test_another_shape_is_refused(base, plain, tmp_path):
    folder = with_extra(plain, tmp_path / "b", norm__weight=torch.ones(7))
    with pytest.raises(Exception, match=r"holds norm.weight of shape \(7,\), and the base's has \(24,\)"):
        bound(folder, base)


def test_pairs_of_a_saved_layer_are_its_gradients(embedded, proxy, tmp_path, private):
    model = peft_model(embedded, modules_to_save=["patch_embed", "head"])
    train(model, embedded, private.batch([0]), private.labels[:1])
    target, update = attach(read_adapter(save(model, tmp_path / "a")), embedded)
    (batch,) = GeneratedPairs(target, update.a, proxy).batches(0, 2)
    for name in ("patch_embed.proj", "head"):
        torch.testing.assert_close(batch.updates[name], batch.gradients.dense(name), rtol=1e-4, atol=1e-6)


def test_a_target_inside_of_a_saved_module_has_no_factors(base, tmp_path):
    folder = trained(base, tmp_path / "a", target_modules=["proj", "qkv"], modules_to_save=["patch_embed"])
    assert not any("patch_embed" in name for name in read_adapter(folder).weights)
    target, _ = bound(folder, base)
    assert target.names[0] == "patch_embed.proj" and target.layers[0].saved
    assert not any(layer.saved for layer in target.layers[1:]) and len(target.layers) == 5


def head_alone(base: BaseModel, folder: Path, steps: int = 1, labels: tuple[int, ...] = (3,), **lora) -> Path:
    """An adapter of which only the saved head was trained: every B is zero."""
    torch.manual_seed(1)
    images, _ = samples(len(labels), base)
    model = peft_model(base, modules_to_save=["head"], **lora).double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("head" in name and parameter.requires_grad)
    train(model, base, images, torch.tensor(labels), lr=LR, steps=steps)
    return save(model, folder)


def test_untrained_factors_leave_the_head_to_be_audited(base, tmp_path):
    folder = head_alone(base, tmp_path / "a")
    torch.manual_seed(1)
    images, labels = samples(1, base)[0], torch.tensor([3])
    target, update = bound(folder, base)
    assert target.names == ("head",) and target.layer("head").saved and update.stored == torch.float64
    torch.testing.assert_close(-update.b["head"], LR * gradient(base, images, labels, "head.weight"))
    features = base.model.forward_head(base.model.forward_features(base.normalize(images)), pre_logits=True)
    given = update.gradients["head.weight"][3] / update.gradients["head.bias"][3]
    torch.testing.assert_close(given, features[0], rtol=1e-6, atol=1e-8)
    problem = adapter_problem(target, [update])
    assert problem.known_labels.tolist() == [3] and problem.steps is None
    assert problem.evidence.sentences == (UNTRAINED,)
    verdicts = verdicts_of(problem)
    assert "cannot be excluded" in verdicts["gauss_newton"].why and not verdicts["adapter_rowspace"].identifiable
    facts = read_adapter(folder).facts
    assert "are untrained" in facts.notes[0] and len(facts.dropped) == 2


@pytest.mark.parametrize(
    ("steps", "labels", "words"),
    [
        (4, (3,), "gives away the label, 3: .* it is the 24 inputs of the last layer"),  # the features stay as they are
        (1, (1, 3, 3), "rose for the classes 1 and 3: "),
        (5, (1, 3, 3), "rose for the classes 1 and 3: "),
    ],
)
def test_the_head_alone_says_what_its_change_shows(steps, labels, words, base, tmp_path):
    files = read_adapter(head_alone(base, tmp_path / "a", steps, labels))
    assert re.search(words, compare_saved(files, base).leaks[0])
    assert bound(files.folder, base)[1].label == (3 if len(set(labels)) == 1 else None)


def test_untrained_factors_and_no_change_that_is_known_are_refused(base, tmp_path):
    untouched = save(peft_model(base, modules_to_save=["head"]), tmp_path / "a")
    with pytest.raises(R2FError, match=r"every B is zero, and nothing .* as the base has it: it was not trained"):
        bound(untouched, base)
    other = head_alone(tiny_base(classes=3), tmp_path / "b", labels=(2,))
    with pytest.raises(
        R2FError, match=r"every B is zero, and nothing .* The start of head\.bias, head\.weight is not in the base"
    ):
        bound(other, base)
    target, update = bound(head_alone(base, tmp_path / "c"), base)
    with pytest.raises(R2FError, match="name where A started, and every B of this adapter is zero"):
        adapter_problem(target, [update], InitialFactors(target, update, seed=0))


def test_the_label_of_the_head_alone_reaches_the_routes(embedded, private, tmp_path):
    model = peft_model(embedded, modules_to_save=["head"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("head" in name and parameter.requires_grad)
    train(model, embedded, private.batch([0]), private.labels[:1])
    steps = MatchingConfig(steps=2)
    config = AuditConfig(pairs=130, decoder_pairs=110, held_out=20, matching=steps, refinement=steps)
    folder = save(model, tmp_path / "a")
    report = audit([folder], proxy="embedded", private="embedded:0", config=config, out=tmp_path / "r")
    (part,) = report.sets
    assert all(found.labels.tolist() == private.labels[:1].tolist() for found in part.reconstructions)
    assert len(part.reconstructions) == 3 and not report.failed and part.judgement.comparisons
    page = (tmp_path / "r" / "report.html").read_text()
    for words in (
        "the LoRA factors are untrained",
        "gives away the label",
        "inputs of the last layer",
        "1 layer saved",
    ):
        assert words in page
    assert "A before training is not known" not in page
