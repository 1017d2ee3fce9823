"""What studies share, against PEFT, autograd and plain loops."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import cosine, peft_model, proxy_set, tiny_base
from peft.tuners.lora import LoraLayer

from r2f_ext.audit.metrics import psnr_db
from r2f_ext.audit.victims import VictimConfig, train_victims
from r2f_ext.capture import Capture
from r2f_ext.data.image_set import content_hashes
from r2f_ext.decoders import Ridge, stack_updates
from r2f_ext.errors import R2FError
from r2f_ext.models import attach, read_adapter
from r2f_ext.pairs import GeneratedPairs, Training
from r2f_ext.studies import CLOTHES, FACES, PHOTOS, Data, scene
from r2f_ext.types import Gradient

CPU = torch.device("cpu")


def by_autograd(base, images, labels):
    """name of a weight -> its gradient of the mean cross entropy of images [b, c, h, w], by autograd alone."""
    model = copy.deepcopy(base.model).requires_grad_()
    F.cross_entropy(model(base.normalize(images)), labels).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def base():
    return scene.base_of("embedded", CPU)


@pytest.fixture(scope="module")
def tiny():
    """A target, one A, public images and their pairs, in float32."""
    small = tiny_base(torch.float32)
    target = scene.target_of(small, rank=4)
    a, public = scene.start_of(target, 1), proxy_set(130, small)
    return target, a, public, GeneratedPairs(target, a, public)


def test_the_default_target_is_what_peft_adapts(base):
    """All linear layers of the blocks; PEFT's own wildcard leaves out the head only."""
    target = scene.target_of(base, rank=4, alpha=8.0)
    model = peft_model(base, r=4, lora_alpha=8, target_modules="all-linear")
    wrapped = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    adapted = [name for name in wrapped if name != "head"]
    assert list(target.names) == adapted and len(adapted) == 16
    for layer in target.layers:
        peft = wrapped[layer.name]
        assert (layer.d_out, layer.d_in) == (peft.out_features, peft.in_features)
        assert (layer.rank, layer.scale) == (peft.r["default"], peft.scaling["default"])


def test_chosen_layers_keep_their_order_and_unknown_ones_are_refused(base):
    assert scene.target_of(base, layers=("blocks.1.mlp.fc2", "head")).names == ("blocks.1.mlp.fc2", "head")
    with pytest.raises(R2FError, match=r"base 'embedded' has no linear layer 'blocks\.9'"):
        scene.target_of(base, layers=("blocks.9",))
    with pytest.raises(R2FError, match="no linear layer 'in a block'"):
        scene.target_of(base, layers=())


def test_victims_equal_those_that_peft_trains(base, tmp_path):
    private = scene.private_images(base, CLOTHES, 0, 2)
    folders = train_victims(base, private.batch(slice(None)), private.labels, tmp_path, VictimConfig())
    attached = [attach(read_adapter(folder), base) for folder in folders]
    target, first = attached[0]
    found = scene.victims_of(scene.target_of(base), first.a, private)
    peft = stack_updates([adapter for _, adapter in attached])
    assert found.updates.keys() == peft.keys() == set(target.names)
    for name, update in peft.items():
        expected = update / VictimConfig().lr
        torch.testing.assert_close(found.updates[name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_a_victims_gradient_is_autograds(tiny):
    target, a, public, _ = tiny
    found = scene.victims_of(target, a, public.take(torch.arange(6)), Training(batch=3))
    assert found.images.shape[:2] == (2, 3) and found.labels.tolist() == public.labels[:6].view(2, 3).tolist()
    for victim in range(2):
        true = by_autograd(target.base, found.images[victim], found.labels[victim])
        for name in target.names:
            wanted = true[f"{name}.weight"]
            torch.testing.assert_close(found.gradient.dense[name][victim], wanted, rtol=1e-3, atol=1e-6)
    exact = scene.exact_gradients_of(target, found.images, found.labels)
    assert all(torch.allclose(exact.dense[n], found.gradient.dense[n], rtol=1e-4, atol=1e-6) for n in target.names)


def test_the_class_mean_is_the_mean_of_unit_pairs_of_the_label(tiny):
    target, a, public, pairs = tiny
    control = scene.ClassMean()
    scene.fit_together(pairs, 60, [control])
    wanted = int(public.labels[0])
    name = target.names[0]
    total = torch.zeros(target.layers[0].d_out, target.layers[0].d_in)
    for row in torch.nonzero(public.labels[:60] == wanted).flatten().tolist():
        one = by_autograd(target.base, public.batch([row]), public.labels[row][None])[f"{name}.weight"]
        total += one / (target.layers[0].scale * one @ a[name].mT).norm()
    guess = control.guess(torch.tensor([[wanted], [wanted]])).dense[name]
    assert F.cosine_similarity(guess[0].flatten(), total.flatten(), dim=0) > 1 - 1e-5
    assert torch.equal(guess[0], guess[1])


def test_the_class_mean_of_several_images_is_the_mean_of_theirs(tiny):
    _, _, public, pairs = tiny
    control = scene.ClassMean()
    scene.fit_together(pairs, 60, [control])
    labels = public.labels[:6].view(2, 3)
    alone, together = control.guess(labels.view(6, 1)), control.guess(labels)
    for name, dense in together.dense.items():
        torch.testing.assert_close(dense, alone.dense[name].unflatten(0, (2, 3)).mean(1))


def test_a_label_without_pairs_gets_the_mean_of_all(tiny):
    _, _, _, pairs = tiny
    control = scene.ClassMean()
    scene.fit_together(pairs, 60, [control])
    every = torch.stack(list(control.sums[pairs.target.names[0]].values())).sum(0)
    assert torch.equal(control.guess(torch.tensor([[77]])).dense[pairs.target.names[0]][0], every)


def test_cosines_are_means_over_layers():
    generator = torch.Generator().manual_seed(0)
    one, two = (Gradient({n: torch.randn(3, 4, k, generator=generator) for n, k in (("a", 5), ("b", 2))}) for _ in "12")
    mean = (cosine(one.dense["a"], two.dense["a"]) + cosine(one.dense["b"], two.dense["b"])) / 2
    torch.testing.assert_close(scene.mean_cosine(one, two), mean.float())
    held = scene.compared_with(Gradient({"b": 3 * two.dense["b"]}), two)
    torch.testing.assert_close(held.cosine["b"], torch.ones(3))
    torch.testing.assert_close(held.norm["b"], torch.full((3,), 3.0))


@pytest.mark.parametrize("data", [CLOTHES, FACES, PHOTOS], ids=lambda data: data.name)
def test_no_private_image_is_a_proxy_and_seeds_share_no_victim(base, data):
    private = [content_hashes(scene.private_images(base, data, seed, 5).images) for seed in (0, 1)]
    every = content_hashes(scene.private_images(base, data, 0, 100).images)
    public = scene.public_images(base, data, 0, 300)
    assert not set(content_hashes(public.images)) & set(every)
    assert not set(private[0]) & set(private[1]) and set(private[0]) | set(private[1]) <= set(every)
    assert not torch.equal(public.images, scene.public_images(base, data, 1, 300).images)


def test_a_private_set_among_the_proxies_is_taken_out(base):
    both = Data("both", "embedded", "embedded+lfw")
    leaking = Data("leaking", "lfw", "embedded+lfw")
    assert len(scene.public_images(base, both, 0, 60)) == 60  # faces are not its private images
    found = scene.public_images(base, leaking, 0, 60)
    faces = content_hashes(scene.private_images(base, leaking, 0, 100).images)
    assert not set(content_hashes(found.images)) & set(faces) and len(found) == 30


def test_more_seeds_than_private_images_are_refused(base):
    with pytest.raises(R2FError, match="'embedded' has 100 images: 40 for seed 2 are not left; use fewer seeds"):
        scene.private_images(base, CLOTHES, 2, 40)


def test_strangers_have_the_victims_label_and_the_mean_image_is_scored(base):
    public = scene.public_images(base, CLOTHES, 0, 300)
    labels = torch.tensor([3, 3, 7, 0])
    rows = scene.stranger_rows(public, labels, 5)
    assert torch.equal(public.labels[rows], labels) and torch.equal(rows, scene.stranger_rows(public, labels, 5))
    assert len(scene.stranger_rows(public, torch.tensor([99]), 0)) == 1  # no such label: any image
    images = scene.private_images(base, CLOTHES, 0, 2).batch(slice(None))
    mean = torch.stack([public.batch([row])[0] for row in range(len(public))]).mean(0)
    expected = torch.stack([psnr_db(mean[None], image[None])[0] for image in images])
    torch.testing.assert_close(scene.mean_image_db(public, images), expected, rtol=1e-4, atol=1e-3)


def test_decoders_and_estimates_fitted_together_are_those_fitted_alone(tiny):
    _, _, public, pairs = tiny
    together, alone, estimates = Ridge(), Ridge(), scene.Estimates()
    scene.fit_together(pairs, 80, (together, estimates))
    alone.fit(pairs, 80)
    (batch,) = pairs.batches(80, 84)
    for name, gradient in alone.decode(batch.updates).dense.items():
        torch.testing.assert_close(together.decode(batch.updates).dense[name], gradient)
    found = estimates.inverter.invert(batch.updates)
    assert found.images.shape == (4, *public.images.shape[1:]) and len(estimates.inverter.labels) == 80


def test_capture_is_left_off_after_exact_gradients(tiny):
    target, _, public, _ = tiny
    scene.exact_gradients_of(target, public.batch([0])[None], public.labels[:1][None])
    with Capture(target):  # a capture that is still on would refuse this, or count hooks twice
        hooks = [len(target.base.model.get_submodule(name)._forward_hooks) for name in target.names]
    assert set(hooks) == {1}
    assert not any(target.base.model.get_submodule(name)._forward_hooks for name in target.names)
