"""load_images: every spec, every promise about private images, every bad input."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from r2f_ext.data import ImageSet, content_hashes, drop_private, fit_images, load, load_images
from r2f_ext.data.fashion_mnist import DEBIAN_FOLDER
from r2f_ext.data.folder import list_folder
from r2f_ext.data.mosaic import read_mosaic, write_mosaic
from r2f_ext.errors import R2FError


def paint(path, value=100, size=(40, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(value)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


@pytest.fixture
def classes(tmp_path):
    for index in range(12):
        paint(tmp_path / f"class{index % 3}" / "deep" / f"{index}.png", index)
    return tmp_path


def check(loaded, n, shape=(3, 32, 32), num_classes=10):
    assert loaded.images.shape == (n, *shape) and loaded.images.dtype == torch.uint8
    assert loaded.labels.shape == (n,) and loaded.labels.dtype == torch.int64
    assert int(loaded.labels.min()) >= 0 and int(loaded.labels.max()) < num_classes


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


@pytest.mark.skipif(not DEBIAN_FOLDER.exists(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_agrees_with_the_assets():
    private = load_images("fashion-mnist", count=100, role="private")
    shipped = load_images("embedded", role="private")
    assert torch.equal(private.images, shipped.images) and torch.equal(private.labels, shipped.labels)
    proxy = load_images("fashion-mnist", count=300)
    check(proxy, 300)
    assert not set(content_hashes(proxy.images)) & set(content_hashes(private.images))


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


def test_folder_with_classes(classes):
    loaded = load_images(str(classes))
    check(loaded, 12)
    assert loaded.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert load_images(str(classes), num_classes=2).labels.tolist() == [0] * 4 + [1] * 4 + [0] * 4
    drawn = load_images(str(classes), count=6, seed=1)
    assert len(drawn) == 6 and set(content_hashes(drawn.images)) < set(content_hashes(loaded.images))
    first = load_images(str(classes), count=6, role="private")
    assert torch.equal(first.images, loaded.images[:6])


def test_flat_folder_of_every_format(tmp_path):
    for index, suffix in enumerate(("png", "jpg", "webp", "bmp", "tif", "JPEG")):
        paint(tmp_path / f"{index}.{suffix}", index)
    for index, mode in enumerate(("L", "1", "P", "RGBA", "LA")):
        paint(tmp_path / f"mode{index}.png", index, mode=mode)
    Image.fromarray(np.full((9, 9), 65535, np.uint16)).save(tmp_path / "wide.png")  # the last by name
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden.png").write_text("not an image")
    (tmp_path / "link.png").symlink_to(tmp_path / "0.png")
    loaded = load_images(str(tmp_path), seed=4)
    check(loaded, 12)
    assert loaded.images[-1].min() == 255
    assert "random" in loaded.notes[0] and not loaded.labels_known


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_unreadable_image_is_named(tmp_path, content):
    good = paint(tmp_path / "good.png")
    (tmp_path / "torn.png").write_bytes(good.read_bytes()[:300] if content is None else content)
    with pytest.raises(R2FError, match=r"torn\.png' cannot be read"):
        load_images(str(tmp_path))


def test_folder_errors(tmp_path):
    with pytest.raises(R2FError, match="has no images"):
        load_images(str(tmp_path))
    paint(tmp_path / "one.png")
    with pytest.raises(R2FError, match="a proxy needs at least 2 images"):
        load_images(str(tmp_path))
    assert len(load_images(str(tmp_path), role="private")) == 1
    paint(tmp_path / "sub" / "two.png")
    with pytest.raises(R2FError, match="both beside and inside"):
        load_images(str(tmp_path))


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
        ({"num_classes": 0}, "num_classes"),
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


def test_drop_private(classes):
    proxy = load_images(str(classes))
    private = proxy.take(torch.tensor([1, 5]))
    left = drop_private(proxy, private)
    assert len(left) == 10 and "2 images" in left.notes[-1]
    assert not set(content_hashes(left.images)) & set(content_hashes(private.images))
    with pytest.raises(R2FError, match="at least 2 images"):
        drop_private(proxy, proxy)
    with pytest.raises(R2FError, match="differ in image shape"):
        drop_private(proxy, load_images(str(classes), input_shape=(1, 32, 32)))


def test_image_set_batches():
    loaded = load_images("embedded", role="private", count=5)
    pixels = loaded.batch([4, 0])
    assert pixels.dtype == torch.float32 and pixels.shape == (2, 3, 32, 32)
    assert torch.equal((pixels[1] * 255).round().to(torch.uint8), loaded.images[0])
    assert pixels.min() >= 0 and pixels.max() <= 1
    with pytest.raises(ValueError, match="uint8"):
        ImageSet("x", pixels, None)
    with pytest.raises(ValueError, match="one label"):
        ImageSet("x", loaded.images, loaded.labels[:2])
    with pytest.raises(ValueError, match="uint8"):
        content_hashes(pixels)


def test_fit_images():
    wide = torch.zeros(2, 3, 20, 60, dtype=torch.uint8)
    wide[..., 20:40] = 200
    assert fit_images(wide, (3, 40, 40))[..., 4:36].float().mean() > 190
    assert fit_images(wide, (1, 20, 20)).unique().tolist() == [200]
    assert fit_images(wide[:0], (1, 20, 20)).shape == (0, 1, 20, 20)


def test_mosaic_round_trip(tmp_path):
    images, labels = torch.randint(0, 256, (11, 7, 5), dtype=torch.uint8), torch.arange(11) % 10
    write_mosaic(tmp_path / "a.png", images, labels)
    write_mosaic(tmp_path / "b.png", images, labels)
    read, digits = read_mosaic(tmp_path / "a.png")
    assert torch.equal(read, images) and torch.equal(digits, labels)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]
    with pytest.raises(ValueError, match="digits"):
        write_mosaic(tmp_path / "c.png", images, labels + 10)


def test_damaged_mosaic(tmp_path):
    for name, content in (("empty.png", b""), ("text.png", b"hello")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(R2FError, match=name):
            read_mosaic(tmp_path / name)
    paint(tmp_path / "plain.png")
    with pytest.raises(R2FError, match="not a readable image mosaic"):
        read_mosaic(tmp_path / "plain.png")


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


def test_numbers_in_names_count_as_numbers(tmp_path):
    names = ["10.png", "2.png", "1.png", "b10.png", "b9.png", "b9a.png", "02.png", "\u00b2.png"]
    for index, name in enumerate(names):
        paint(tmp_path / name, index)
    found = [path.name for path in list_folder(tmp_path)[0]]
    assert found == ["1.png", "02.png", "2.png", "10.png", "b9.png", "b9a.png", "b10.png", "\u00b2.png"]


def test_classes_keep_the_numbers_that_torchvision_gives(tmp_path):
    for name in ("10", "9", "1"):
        paint(tmp_path / name / "a.png")
    paths, classes = list_folder(tmp_path)
    expected = datasets.ImageFolder(str(tmp_path)).class_to_idx
    assert [expected[path.parent.name] for path in paths] == classes
