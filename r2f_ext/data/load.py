"""Loads proxy and private images by name. `load_images` is the entry point of this package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torchvision import datasets

from r2f_ext.data.fashion_mnist import load_fashion_mnist
from r2f_ext.data.folder import list_folder, read_images
from r2f_ext.data.image_set import MAX_BYTES, ImageSet, fit_images, unseen_rows
from r2f_ext.data.mosaic import read_mosaic
from r2f_ext.data.photos import PRIVATE_PHOTOS, PROXY_PHOTOS, load_faces, photo_crops
from r2f_ext.data.procedural import procedural_images, procedural_labels
from r2f_ext.errors import R2FError
from r2f_ext.files import cache_folder
from r2f_ext.types import BaseModel

ASSETS = Path(__file__).parent / "assets"
PROXY_ASSET, PRIVATE_ASSET = ASSETS / "fashion_mnist_proxy.png", ASSETS / "fashion_mnist_private.png"
DEFAULT_COUNT = {"proxy": 8000, "private": 100}
# Generated private images use seeds that no proxy uses.
PRIVATE_SEED = 1 << 32
Shape = tuple[int, int, int]


def load_images(
    spec: str,
    *,
    input_shape: Shape = (3, 32, 32),
    num_classes: int = 10,
    count: int | None = None,
    seed: int = 0,
    role: str = "proxy",
) -> ImageSet:
    """Load images at a model's input size.

    Args:
        spec: one of
            `embedded` - Fashion-MNIST in the package: 10,000 train images as proxy, test images 0-99 as private;
            `fashion-mnist` - all of it: train as proxy (less any image that is also in test), test as private;
            `cifar100` - through torchvision's downloader: train as proxy (less images also in test), test as private;
            `lfw` - the 100 faces in scikit-image;
            `photos` - crops of photographs in scikit-image; proxy and private use different photographs;
            `procedural` - generated from the seed; the default count is 8,000 as proxy and 100 as private;
            a folder - its images, recursively; first-level subfolders are the classes;
            `a+b` - several of these, shuffled, with the count split evenly.
        input_shape: (c, h, w), c 1 or 3.
        num_classes: number of classes of the model. Larger labels are folded: label % num_classes.
            Faces, photographs, procedural images and flat folders have no labels of these classes, so their labels are
            drawn uniformly from the seed.
        count: number of images. If fewer exist, all are used and `notes` says so. For a proxy the seed draws a random
            subset; private images are the first `count`.
        seed: determines every random choice.
        role: `proxy` or `private`.

    Returns:
        An ImageSet with uint8 images [n, c, h, w] and int64 labels [n].

    Raises:
        R2FError: unknown name, no images or unreadable ones, a proxy of fewer than 2 images, a bad count or shape,
            more than 4 GiB of pixels, or a data set that is not on this machine and cannot be downloaded.
    """
    _check(input_shape, num_classes, count, seed, role)
    request = _Request(input_shape, num_classes, count, seed, role)
    loaded = request.load(spec)
    if count is not None and len(loaded) < count:
        loaded = loaded.noted(f"'{spec}' has {len(loaded)} images, fewer than the {count} asked for.")
    if role == "proxy" and len(loaded) < 2:
        raise R2FError(f"a proxy needs at least 2 images, but '{spec}' gives {len(loaded)}: add images or mix sets.")
    return loaded


def images_for(base: BaseModel, spec: str, *, count: int | None = None, seed: int = 0, role: str = "proxy") -> ImageSet:
    """`load_images` at the base's input size and with its number of classes."""
    return load_images(
        spec, input_shape=base.input_shape, num_classes=base.num_classes, count=count, seed=seed, role=role
    )


def _check(shape: Shape, num_classes: int, count: int | None, seed: int, role: str) -> None:
    if role not in DEFAULT_COUNT:
        raise R2FError(f"unknown role '{role}': use 'proxy' or 'private'.")
    if len(shape) != 3 or shape[0] not in (1, 3) or min(shape[1:]) < 8:
        raise R2FError(f"input shape {tuple(shape)} is not (1 or 3, height, width) with sides of at least 8.")
    if num_classes < 1:
        raise R2FError(
            "images need a label, and the base has no classifier that would name its classes: pass one with its "
            "classifier."
        )
    if seed < 0:
        raise R2FError(f"the seed of images must be at least 0, got {seed}.")
    if count is not None and count < 1:
        raise R2FError(f"the count of {role} images must be at least 1, got {count}.")


class _Request:
    """The arguments of one call of `load_images`, shared by the loaders."""

    def __init__(self, shape: Shape, num_classes: int, count: int | None, seed: int, role: str) -> None:
        self.shape, self.num_classes, self.count, self.seed, self.role = shape, num_classes, count, seed, role
        # Generated private images and random labels must differ from those of the proxy.
        self.stream = seed if role == "proxy" else seed + PRIVATE_SEED

    def load(self, spec: str) -> ImageSet:
        """Dispatch on the name. A folder takes precedence over a mix, because its name may contain `+`."""
        if spec in LOADERS:
            return LOADERS[spec](self)
        if spec and Path(spec).is_dir():
            return self.folder(Path(spec))
        if "+" in spec:
            return self.mix(spec)
        raise R2FError(f"unknown images '{spec}': use {', '.join(LOADERS)}, a folder that exists, or a mix like a+b.")

    def rows(self, available: int) -> Tensor:
        """Indices int64 of the images to use: a random choice for a proxy, the first ones for private images."""
        if self.count is None or self.count >= available:
            return torch.arange(available)
        if self.role == "private":
            return torch.arange(self.count)
        order = torch.randperm(available, generator=torch.Generator().manual_seed(self.seed))
        return order[: self.count]

    def generated_count(self) -> int:
        """How many images to generate."""
        count = DEFAULT_COUNT[self.role] if self.count is None else self.count
        channels, height, width = self.shape
        if count * channels * height * width > MAX_BYTES:
            raise R2FError(f"{count} images of {height}x{width} need more than 4 GiB: pass a smaller count.")
        return count

    def build(self, name: str, images: Tensor, labels: Tensor, notes: tuple[str, ...] = ()) -> ImageSet:
        """Choose rows, fit them to the shape and fold the labels."""
        rows = self.rows(len(images))
        return self.folded(ImageSet(name, fit_images(images[rows], self.shape), labels[rows], notes))

    def folded(self, loaded: ImageSet) -> ImageSet:
        """Fold labels with label % num_classes, and add a note if that changes any."""
        if not len(loaded) or int(loaded.labels.max()) < self.num_classes:
            return loaded
        folded = replace(loaded, labels=loaded.labels % self.num_classes)
        return folded.noted(f"The labels of '{loaded.name}' exceed the {self.num_classes} classes and were folded.")

    def unlabelled(self, name: str, images: Tensor) -> ImageSet:
        """`images`, already at the input size, with labels from the seed."""
        labels = procedural_labels(len(images), self.num_classes, self.stream)
        note = f"The labels of '{name}' are random, from the seed."
        return ImageSet(name, images, labels, (note,), random_labels=True, labels_known=False)

    def embedded(self) -> ImageSet:
        images, labels = read_mosaic(PROXY_ASSET if self.role == "proxy" else PRIVATE_ASSET)
        return self.build("embedded", images[:, None], labels)

    def fashion_mnist(self) -> ImageSet:
        test_images, test_labels = load_fashion_mnist("test")
        if self.role == "private":
            return self.build("fashion-mnist", test_images[:, None], test_labels)
        return self.without("fashion-mnist", *load_fashion_mnist("train"), test_images, channel=True)

    def cifar100(self) -> ImageSet:
        test_images, test_labels = _cifar100(train=False)
        if self.role == "private":
            return self.build("cifar100", test_images, test_labels)
        return self.without("cifar100", *_cifar100(train=True), test_images)

    def without(self, name: str, images: Tensor, labels: Tensor, private: Tensor, channel: bool = False) -> ImageSet:
        """Build a proxy of the `images` that equal no image of `private`; `channel` adds the channel axis."""
        rows = unseen_rows(images, private)
        dropped = len(images) - len(rows)
        notes = (f"{dropped} train images of '{name}' are also test images and were removed.",) if dropped else ()
        chosen = images[rows]
        return self.build(name, chosen[:, None] if channel else chosen, labels[rows], notes)

    def lfw(self) -> ImageSet:
        faces = load_faces()
        return self.unlabelled("lfw", fit_images(faces[self.rows(len(faces))], self.shape))

    def photos(self) -> ImageSet:
        names = PROXY_PHOTOS if self.role == "proxy" else PRIVATE_PHOTOS
        return self.unlabelled("photos", photo_crops(names, self.generated_count(), self.shape, self.stream))

    def procedural(self) -> ImageSet:
        return self.unlabelled("procedural", procedural_images(self.generated_count(), self.shape, self.stream))

    def folder(self, folder: Path) -> ImageSet:
        paths, classes = list_folder(folder)
        rows = self.rows(len(paths))
        images = read_images([paths[row] for row in rows.tolist()], self.shape)
        if classes is None:
            return self.unlabelled(str(folder), images)
        return self.folded(ImageSet(str(folder), images, torch.tensor(classes)[rows]))

    def mix(self, spec: str) -> ImageSet:
        """Concatenate the parts of `a+b` and shuffle them; part i uses seed + i."""
        names = spec.split("+")
        if not all(names):
            raise R2FError(f"the mix '{spec}' has an empty part: write it like procedural+embedded.")
        sets = []
        for number, name in enumerate(names):
            count = None if self.count is None else (self.count + len(names) - 1 - number) // len(names)
            if count == 0:
                continue
            part = _Request(self.shape, self.num_classes, count, self.seed + number, self.role).load(name)
            if count is not None and len(part) < count:
                part = part.noted(f"'{name}' has {len(part)} images, fewer than its part of {count}.")
            sets.append(part)
        images = torch.cat([part.images for part in sets])
        labels = torch.cat([part.labels for part in sets])
        notes = tuple(dict.fromkeys(note for part in sets for note in part.notes))
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))
        random_labels = all(part.random_labels for part in sets)
        known = all(part.labels_known for part in sets)
        return ImageSet(spec, images, labels, notes, random_labels, known).take(order)


def _cifar100(train: bool) -> tuple[Tensor, Tensor]:
    """CIFAR-100 as uint8 [n, 3, 32, 32] and int64 [n], by torchvision into `$R2F_DATA`."""
    folder = cache_folder()
    try:
        data = datasets.CIFAR100(str(folder), train=train, download=True)
    except Exception as error:  # RuntimeError, URLError or OSError, depending on the version
        raise R2FError(
            f"CIFAR-100 is not under '{folder}' and could not be downloaded: connect once, set R2F_DATA to where "
            f"it is, or use procedural or embedded."
        ) from error
    return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets, dtype=torch.int64)


LOADERS: dict[str, Callable[[_Request], ImageSet]] = {
    "embedded": _Request.embedded,
    "fashion-mnist": _Request.fashion_mnist,
    "cifar100": _Request.cifar100,
    "lfw": _Request.lfw,
    "photos": _Request.photos,
    "procedural": _Request.procedural,
}
