"""load_images: every spec, every promise about private images, every bad input."""

import numpy as np
import pytest
import torch
from image_cases import check

from r2f_ext.data import content_hashes, load, load_images
from r2f_ext.errors import R2FError


@pytest.mark.parametrize("role", ["proxy", "private"])
@pytest.mark.parametrize("spec", ["embedded", "lfw", "photos", "procedural", "procedural+embedded"])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 20, 24)])
def test_specs(spec, role, shape):
    loaded = load_images(spec, input_shape=shape, num_classes=7, count=21, seed=5, role=role)
    check(loaded, 21, shape, 7)
    again = load_images(spec, input_shape=shape, num_classes=7, count=21, seed=5, role=role)
    assert torch.equal(loaded.images, again.images) and torch.equal(loaded.labels, again.labels)
    assert loaded.images.float().flatten(1).std(1).min() > 0


def test_sizes_without_count():
    check(load_images("embedded"), 10_000)
    check(load_images("embedded", role="private"), 100)
    check(load_images("lfw", role="private"), 100)
    check(load_images("procedural", role="private"), 100)


def test_private_never_in_proxy():
    proxy = set(content_hashes(load_images("embedded").images))
    proxy |= set(content_hashes(load_images("procedural", count=2000).images))
    proxy |= set(content_hashes(load_images("photos", count=200).images))
    for spec in ("embedded", "procedural", "photos", "lfw"):
        assert not proxy & set(content_hashes(load_images(spec, role="private").images))


def test_embedded_has_all_classes_and_the_pretraining_padding():
    loaded = load_images("embedded")
    assert loaded.labels.bincount(minlength=10).min() > 800
    border = torch.ones(32, 32, dtype=torch.bool)
    border[2:30, 2:30] = False
    assert loaded.images[..., border].max() == 0
    assert torch.equal(loaded.images[:, 0], loaded.images[:, 2])


def test_fashion_mnist_drops_private_train_images(monkeypatch):
    pixels = torch.randint(0, 256, (6, 28, 28), dtype=torch.uint8)
    splits = {"train": (pixels, torch.arange(6)), "test": (pixels[2:4], torch.tensor([2, 3]))}
    monkeypatch.setattr(load, "load_fashion_mnist", splits.__getitem__)
    proxy = load_images("fashion-mnist")
    assert proxy.labels.tolist() == [0, 1, 4, 5]
    assert "2 train images" in proxy.notes[0]


def test_cifar100_by_torchvision(monkeypatch):
    class Fake:
        def __init__(self, root, train, download):
            rng = np.random.default_rng(0 if train else 1)
            self.data = rng.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
            self.targets = list(range(70, 100))

    monkeypatch.setattr("torchvision.datasets.CIFAR100", Fake)
    check(load_images("cifar100", num_classes=100), 30, num_classes=100)
    private = load_images("cifar100", role="private", count=4)
    assert private.labels.tolist() == [0, 1, 2, 3] and "folded" in private.notes[0]
    assert private.images[0, :, 0, 1].tolist() == Fake("", False, False).data[0, 0, 1].tolist()


def test_cifar100_without_network(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("offline")

    monkeypatch.setattr("torchvision.datasets.CIFAR100", fail)
    with pytest.raises(R2FError, match=r"CIFAR-100 .* could not be downloaded"):
        load_images("cifar100")


@pytest.mark.parametrize("spec", ["", "nothing-like-it", "embedded+nothing-like-it", "a.png"])
def test_unknown_spec(spec):
    with pytest.raises(R2FError, match="unknown images"):
        load_images(spec)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"spec": "embedded+"}, "empty part"),
        ({"count": 0}, "at least 1"),
        ({"count": 1}, "at least 2 images"),
        ({"role": "public"}, "unknown role"),
        ({"input_shape": (4, 32, 32)}, "input shape"),
        ({"num_classes": 0}, "the base has no classifier"),
        ({"input_shape": (3, 2048, 2048)}, "more than 4 GiB"),
        ({"spec": "procedural", "count": 10**9}, "more than 4 GiB"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(R2FError, match=words):
        load_images(**{"spec": "embedded", **options})


def test_fewer_than_asked_for_is_noted():
    loaded = load_images("lfw", role="private", count=500)
    assert len(loaded) == 100 and "fewer than the 500" in loaded.notes[-1]


def test_mix_splits_the_count(classes):
    mixed = load_images(f"procedural+{classes}", count=15)
    assert len(mixed) == 15
    folder = set(content_hashes(load_images(str(classes)).images))
    assert sum(h in folder for h in content_hashes(mixed.images)) == 7
    short = load_images(f"{classes}+procedural", count=40)
    assert len(short) == 32 and "its part of 20" in " ".join(short.notes)
    twice = load_images("procedural+procedural", count=20)
    assert len(set(content_hashes(twice.images))) == 20


def test_package_assets_are_small():
    assert sum(path.stat().st_size for path in load.ASSETS.iterdir()) < 5_000_000


def test_a_set_says_whether_its_labels_mean_anything():
    assert load_images("procedural", count=8).random_labels and load_images("lfw", count=8).random_labels
    assert not load_images("embedded", count=8).random_labels
    assert load_images("procedural+lfw", count=8).random_labels
    assert not load_images("procedural+embedded", count=8).random_labels
    assert load_images("procedural", count=8).take(torch.arange(3)).random_labels


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"num_classes": 0}, "pass one with its classifier"), ({"seed": -1}, "seed of images must be")],
)
def test_a_base_without_classes_and_a_negative_seed_have_sentences_of_their_own(arguments, words):
    with pytest.raises(R2FError, match=words):
        load_images("procedural", count=2, **arguments)


def test_labels_are_known_where_all_of_them_are_those_of_their_images(classes):
    assert load_images("embedded", count=8).labels_known and load_images(str(classes)).labels_known
    for spec in ("procedural", "lfw", "photos", "procedural+embedded", f"{classes}+lfw"):
        assert not load_images(spec, count=8).labels_known
    assert not load_images("procedural", count=8).take(torch.arange(3)).labels_known
