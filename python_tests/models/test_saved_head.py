"""Labels and last-layer inputs from heads that torch.optim trained."""

import pytest
import timm
import torch
import torch.nn.functional as F
from cases import peft_model, save, train
from torch import nn
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher, ResNetConfig, ResNetForImageClassification
from transformers_cases import CLASSES as FEW
from transformers_cases import FAMILIES, SIZES, classifier

from r2f_ext.audit.inputs import load_adapters
from r2f_ext.inversion.geometry import structural_tokens
from r2f_ext.models.saved_head import head_leak, is_head, new_head_leak
from r2f_ext.models.timm_base import describe, save_base

CLASSES, WIDTH = 6, 32


def moved(labels, optimizer="SGD", steps=1, bias=True, loss=F.cross_entropy, lr=0.1, move_features=False, seed=0):
    """start - end of a head's weight and bias after a training on features, and the features [n, WIDTH]."""
    torch.manual_seed(seed)
    head = nn.Linear(WIDTH, CLASSES, bias=bias).double()
    before = [p.detach().clone() for p in head.parameters()]
    features = torch.randn(len(labels), WIDTH).double()
    drift = torch.randn(len(labels), WIDTH).double()
    trainer = getattr(torch.optim, optimizer)(head.parameters(), lr=lr)
    for step in range(steps):
        trainer.zero_grad()
        seen = features + (0.2 * step * drift if move_features else 0)
        loss(head(seen), torch.tensor(labels)).backward()
        trainer.step()
    after = [p.detach() for p in head.parameters()]
    change = [start - end for start, end in zip(before, after, strict=True)]
    return change[0], change[1] if bias else None, features


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("label", range(CLASSES))
def test_one_image_gives_its_label_away(label, bias):
    weight, change, features = moved([label], bias=bias, seed=label)
    found = head_leak(weight, change, 1e-12)
    assert found.label == label and f"gives away the label, {label}:" in found.leaks[0]
    if bias:
        given = weight[label] / change[label]
        torch.testing.assert_close(given, features[0], rtol=1e-8, atol=1e-10)
        assert f"it is the {WIDTH} inputs of the last layer (rows agree to" in found.leaks[0]
    else:
        assert float(F.cosine_similarity(weight[label], features[0], dim=0).abs()) == pytest.approx(1.0)
        assert "multiples of the 32 inputs" in found.leaks[0]


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "Adam"])
@pytest.mark.parametrize("steps", [1, 5, 40])
def test_the_bias_tells_the_label_after_any_number_of_steps_on_one_image(optimizer, steps):
    for label in range(CLASSES):
        options = {"lr": 0.01 if optimizer != "SGD" else 0.1, "move_features": True, "seed": label}
        weight, bias, _ = moved([label], optimizer, steps, **options)
        assert head_leak(weight, bias, 1e-12).label == label


def test_the_first_step_of_adam_shows_signs_of_the_features():
    weight, bias, features = moved([2], "Adam")
    found = head_leak(weight, bias, 1e-12)
    assert found.label == 2 and "hold the signs" in found.leaks[0] and "divided" not in found.leaks[0]
    assert torch.equal(-weight[2].sign(), features[0].sign())


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize("steps", [1, 20])
@pytest.mark.parametrize("labels", [[3, 3, 3, 5], [0, 1], [2, 2], [4, 4, 1, 0, 2, 3, 5, 5]])
def test_classes_whose_bias_rose_were_there(labels, steps, optimizer):
    """Counts are not told: the learning rate is unknown."""
    for seed in range(10):
        weight, bias, _ = moved(labels, optimizer, steps, lr=0.01, seed=seed)
        found = head_leak(weight, bias, 1e-12)
        rose = torch.nonzero(bias < 0).flatten().tolist()
        assert set(rose) <= set(labels) and len(found.leaks) == 1
        assert "rose for" in found.leaks[0] and all(str(one) in found.leaks[0] for one in rose)
        assert found.label == (rose[0] if len(rose) == 1 else None)
        assert found.label is None or found.label in labels


def test_several_images_without_a_bias_tell_nothing_for_certain():
    weight, _, _ = moved([0, 3, 3, 1], bias=False)
    found = head_leak(weight, None, 1e-12)
    assert found.label is None and "no label for certain" in found.leaks[0]


def test_two_classes_without_a_bias_are_alike():
    torch.manual_seed(0)
    weight = torch.randn(1, 8).double() * torch.tensor([[1.0], [-1.0]]).double()
    assert head_leak(weight, None, 1e-12).label is None
    assert head_leak(weight, torch.tensor([0.5, -0.5]).double(), 1e-12).label == 1


def test_noise_is_no_label():
    labels = [head_leak(torch.randn(10, 64).double(), None, 1e-7).label for _ in range(50)]
    assert labels == [None] * 50


def test_label_smoothing_makes_no_false_certainty():
    def smooth(logits, labels):
        return F.cross_entropy(logits, labels, label_smoothing=0.1)

    for seed in range(20):
        weight, bias, _ = moved([seed % CLASSES], loss=smooth, seed=seed)
        found = head_leak(weight, bias, 1e-12)
        assert found.label in (None, seed % CLASSES) and "plain cross-entropy" in found.leaks[0]


def test_a_frozen_bias_is_no_bias():
    weight, _, _ = moved([4], bias=False)
    assert head_leak(weight, torch.zeros(CLASSES).double(), 1e-12) == head_leak(weight, None, 1e-12)


def test_a_new_head_whose_bias_began_at_zero():
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, CLASSES).double()
    nn.init.zeros_(head.bias)
    features, labels = torch.randn(40, WIDTH).double(), torch.randint(0, 4, (40,))
    trainer = torch.optim.AdamW(head.parameters(), lr=0.01)
    for _ in range(30):
        trainer.zero_grad()
        F.cross_entropy(head(features), labels).backward()
        trainer.step()
    (said,) = new_head_leak(head.bias.detach())
    rose = torch.nonzero(head.bias > 0).flatten().tolist()
    assert set(rose) <= set(labels.tolist()) and all(str(one) in said for one in rose)
    assert new_head_leak(torch.zeros(4)) == () and new_head_leak(torch.ones(4)) == ()


TIMM = {
    "vit_tiny_patch16_224": {"head"},
    "deit_tiny_distilled_patch16_224": {"head", "head_dist"},
    "convnext_atto": {"head.fc"},
    "swin_tiny_patch4_window7_224": {"head.fc"},
    "levit_128s": {"head.linear", "head_dist.linear"},
    "resnet18": {"fc"},
    "mobilenetv3_small_050": {"classifier"},
    "inception_v4": {"last_linear"},
}


def heads_of(model):
    return {name for name, module in model.named_modules() if is_head(name) and hasattr(module, "weight")}


@pytest.mark.parametrize("name", TIMM)
def test_the_heads_of_timm_are_those_that_timm_names(name):
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, num_classes=7)
    named = model.pretrained_cfg["classifier"]
    assert heads_of(model) == TIMM[name] == set([named] if isinstance(named, str) else named)
    assert all(len(model.get_submodule(head).weight) == 7 for head in TIMM[name])
    assert set(structural_tokens(describe(model, name), TIMM[name]).values()) == {1}


def small_transformers():
    teacher = DeiTForImageClassificationWithTeacher(DeiTConfig(**SIZES, num_labels=FEW))
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=FEW)
    return {
        **{family: classifier(family) for family in FAMILIES},
        "deit with teacher": teacher,
        "resnet": ResNetForImageClassification(resnet),
    }


def test_the_heads_of_transformers_are_its_linear_layers_of_so_many_classes():
    for family, model in small_transformers().items():
        outer = {name for name, each in model.named_modules() if getattr(each, "out_features", 0) == FEW}
        assert heads_of(model) == outer and outer, family


def test_a_wrapped_head_counts_and_an_inner_layer_of_that_name_does_not():
    assert is_head("timm_model.head.fc") and is_head("head.fc")
    assert not any(
        map(is_head, ("blocks.0.attn.fc", "stages.1.head", "heads.head", "header", "", "fc1", "text.classifier"))
    )


def test_a_head_of_other_classes_below_the_top_sets_the_bases(tmp_path):
    """convnext: `head.fc`, whose five classes are the base's and whose three are the adapter's."""
    options = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}

    def made(classes):
        torch.manual_seed(1)
        model = timm.create_model("convnext_atto", num_classes=classes, **options)
        return describe(model.eval().requires_grad_(False), "x")

    save_base(made(5), tmp_path / "base", "convnext_atto", {**options, "num_classes": 5})
    base = made(3)
    model = peft_model(base, target_modules=["mlp.fc1"], modules_to_save=["head.fc"])
    train(model, base, torch.rand(1, 3, 32, 32), torch.tensor([2]))
    loaded = load_adapters([save(model, tmp_path / "a")], str(tmp_path / "base"))
    assert loaded.target.base.num_classes == 3
    torch.testing.assert_close(
        loaded.target.base.model.head.fc.weight, model.base_model.model.head.fc.modules_to_save["default"].weight
    )
    assert any("head.fc.weight" in note and "stands in" in note for note in loaded.facts[0].notes)
