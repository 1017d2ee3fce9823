"""Labels and last-layer inputs from heads that torch.optim trained."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from r2f_ext.models.saved_head import head_leak, new_head_leak

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
