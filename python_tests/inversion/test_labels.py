"""Labels from real gradients of real models."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from r2f_ext.errors import R2FError
from r2f_ext.inversion.labels import recover_labels


def last_layer_gradients(labels, head_scale, classes=10, positive=True):
    """Gradients of the last layer's weight [classes, d] and bias [classes], averaged over the images."""
    features = torch.randn(len(labels), 16)
    head = nn.Linear(16, classes)
    nn.init.normal_(head.weight, std=head_scale)
    nn.init.zeros_(head.bias)
    loss = F.cross_entropy(head(features.relu() if positive else features), torch.tensor(labels))
    return torch.autograd.grad(loss, [head.weight, head.bias])


@pytest.mark.parametrize("positive", [True, False])
def test_one_image(positive):
    for label in range(10):
        weight, bias = last_layer_gradients([label], 0.5, positive=positive)
        assert recover_labels(weight[None]).tolist() == [[label]]
        assert recover_labels(7 * weight[None]).tolist() == [[label]]
        assert recover_labels(None, bias[None]).tolist() == [[label]]
        assert recover_labels(weight[None], bias[None]).tolist() == [[label]]


@pytest.mark.parametrize("labels", [[3, 3], [3, 3, 3, 7], [0, 1, 2, 3], [9, 9, 9, 1, 4, 4, 0, 2], [5] * 16])
def test_counts_of_a_batch_with_a_fresh_head(labels):
    weight, bias = last_layer_gradients(labels, 0.02)
    assert recover_labels(weight[None], bias[None], batch=len(labels)).tolist() == [sorted(labels)]


def test_known_probabilities_make_counts_exact():
    torch.manual_seed(4)
    labels = torch.randint(0, 10, (32,))
    features, head = torch.randn(32, 16), nn.Linear(16, 10)
    nn.init.normal_(head.weight, std=0.7)
    logits = head(features)
    (bias,) = torch.autograd.grad(F.cross_entropy(logits, labels), [head.bias])
    p = logits.softmax(1).mean(0).detach()
    expected = [sorted(labels.tolist())]
    assert recover_labels(None, bias[None], batch=32, probabilities=p).tolist() == expected
    with pytest.raises(R2FError, match=r"class 7 would be there 3\.47 times"):
        recover_labels(None, bias[None], batch=32)  # uniform is no good guess here


@pytest.mark.parametrize("labels", [[3, 3, 3, 7], [3, 7], [7, 7, 7, 7]])
def test_labels_of_a_trained_head_are_counted_right_or_refused(labels, embedded, private):
    """The head that autograd differentiates is sure of its classes, so uniform probabilities are a bad guess."""
    images = embedded.normalize(private.batch([0, 1, 2, 0][: len(labels)]))
    head = embedded.model.head
    with torch.no_grad():
        features = embedded.model.forward_head(embedded.model.forward_features(images), pre_logits=True)
    bias = head.bias.detach().clone().requires_grad_(True)
    logits = F.linear(features, head.weight.detach(), bias)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, torch.tensor(labels)), [bias])
    p = logits.detach().softmax(1).mean(0)
    exact = recover_labels(None, gradient[None], batch=len(labels), probabilities=p)
    assert exact.tolist() == [sorted(labels)]
    try:
        assert recover_labels(None, gradient[None], batch=len(labels)).tolist() == [sorted(labels)]
    except R2FError as refused:
        assert "cannot be counted" in str(refused) and len(str(refused).splitlines()) == 1


def test_a_count_is_never_wrong_in_silence():
    """Heads from fresh to sure of themselves: every answer is right, and fresh heads get one."""
    answered = {}
    for scale in (0.02, 0.1, 0.3, 1.0, 3.0):
        for seed in range(40):
            torch.manual_seed(seed)
            labels = torch.randint(0, 10, (4,)).tolist()
            _, bias = last_layer_gradients(labels, scale)
            try:
                found = recover_labels(None, bias[None], batch=4).tolist()
            except R2FError:
                continue
            assert found == [sorted(labels)], (scale, seed)
            answered[scale] = answered.get(scale, 0) + 1
    assert answered[0.02] == 40 and answered.get(3.0, 0) == 0


def test_victims_are_told_apart():
    gradients = [last_layer_gradients([label], 0.1) for label in (4, 7)]
    weight, bias = (torch.stack(parts) for parts in zip(*gradients, strict=True))
    assert recover_labels(weight, bias).tolist() == [[4], [7]]
    assert recover_labels(weight).tolist() == [[4], [7]]


def test_bad_input_is_one_sentence():
    weight, bias = last_layer_gradients([1], 0.1)
    cases = [
        ((None,), {}, "neither is there"),
        ((weight,), {}, r"\[10, 16\]"),
        ((weight[None] * float("nan"),), {}, "not finite"),
        ((weight[None], bias[None] * 0), {}, "converged"),
        ((weight[None],), {"batch": 2}, "need the gradient of the last layer's bias"),
        ((weight[None], bias[None]), {"batch": 0}, "at least one image"),
        ((weight[None], bias[None]), {"batch": 2, "probabilities": torch.ones(3)}, "10 classes"),
    ]
    for arguments, options, words in cases:
        with pytest.raises(R2FError, match=words):
            recover_labels(*arguments, **options)
