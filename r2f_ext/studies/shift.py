"""Public images of every kind, and how far their updates are from the victims'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from r2f_ext.audit.metrics import psnr_db
from r2f_ext.data import ImageSet, images_for
from r2f_ext.decoders import Decoder, Updates
from r2f_ext.errors import R2FError
from r2f_ext.inversion.amortised import AmortisedInverter, unit_rows
from r2f_ext.kernel_solver import fit_by_leave_one_out
from r2f_ext.linalg import gram
from r2f_ext.studies.scene import (
    Observed,
    mean_cosine,
    mean_image_db,
    other_private_images,
    private_images,
    public_images,
    stranger_rows,
)
from r2f_ext.studies.study import Data, Measured, World
from r2f_ext.studies.table import Row, Table, Value, difference
from r2f_ext.types import BaseModel, Gradient

GENERATED = "procedural"
SHARES = (1e-3, 1e-2, 1e-1, 1.0)  # candidate dampings of the linear classifier; leave-one-out errors choose one
LEAST = 4  # images that each half of the private images without the victims must have


@dataclass(frozen=True)
class Split:
    """The private images of one seed.

    Attributes:
        victims: whose adapters are attacked.
        others: half of the images that are no victims: a sample of the distribution that the victims come from.
        public: the other half: `public_of` makes public images from them if the set has no public part.
    """

    victims: ImageSet
    others: ImageSet
    public: ImageSet


def split_of(base: BaseModel, data: Data, seed: int, victims: int) -> Split:
    """Split private images.

    Raises:
        R2FError: too few are left beside the victims.
    """
    rest = other_private_images(base, data, seed, victims)
    half = len(rest) // 2
    if half < LEAST:
        raise R2FError(
            f"'{data.private}' has {len(rest)} private images beside {victims} victims, and {2 * LEAST} are needed: "
            "add images."
        )
    order = torch.arange(2 * half)
    chosen = private_images(base, data, seed, victims)
    return Split(chosen, rest.take(order[:half]), rest.take(order[half:]))


def public_of(world: World, base: BaseModel, kind: str, seed: int, count: int, victims: int) -> ImageSet:
    """`count` public images of a kind: procedural, or those that resemble the private ones of `world.named(kind)`.

    The latter are the public part of the same set (clothes, photographs) if the data name that set as their proxy.
    Otherwise they are the `public` images of the split, mirrored and shifted.

    Raises:
        R2FError: the set has fewer.
    """
    if kind == GENERATED:
        return images_for(base, GENERATED, count=count, seed=seed)
    data = world.named(kind)
    if data.proxy != data.private:
        return varied(split_of(base, data, seed, victims).public, count, seed)
    return public_images(base, data, seed, count, least=count)


def varied(images: ImageSet, count: int, seed: int) -> ImageSet:
    """Make `count` images from a few.

    Each is a random one of them, mirrored with probability 1/2 and shifted by up to 2 pixels; edge pixels are repeated.
    Random labels are permuted; other labels stay with their images.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(images), (count,), generator=generator)
    pixels, (height, width) = images.images[rows], images.images.shape[2:]
    mirrored = torch.rand(count, generator=generator) < 0.5
    pixels[mirrored] = pixels[mirrored].flip(3)
    wide = F.pad(pixels.float(), (2, 2, 2, 2), mode="replicate").to(torch.uint8)
    moves = torch.randint(5, (count, 2), generator=generator).tolist()
    moved = [each[:, y : y + height, x : x + width] for each, (y, x) in zip(wide, moves, strict=True)]
    labels = images.labels[rows]
    if images.random_labels:
        labels = labels[torch.randperm(count, generator=generator)]
    return replace(images, images=torch.stack(moved), labels=labels)


def cosines_of(decoder: Decoder, sets: Sequence[Observed]) -> list[Tensor]:
    """Cosines [V], averaged over layers, of several sets of victims: decoded together, in one pass over the pairs."""
    names = sets[0].updates
    decoded = decoder.decode({name: torch.cat([each.updates[name] for each in sets]) for name in names})
    ends = torch.tensor([len(each.labels) for each in sets]).cumsum(0).tolist()
    rows = [slice(end - len(each.labels), end) for end, each in zip(ends, sets, strict=True)]
    parts = [Gradient({name: dense[row] for name, dense in decoded.dense.items()}) for row in rows]
    return [mean_cosine(part, each.gradient) for part, each in zip(parts, sets, strict=True)]


def reconstructions(
    inverter: AmortisedInverter, observed: Observed, others: Updates, kind: ImageSet, public: ImageSet, seed: int
) -> list[Measured]:
    """PSNR of the amortised route on victims of one image each, and of two controls.

    Args:
        others, kind: updates, name -> [n, d_out, r], and images [n] of the victims' kind. The strangers are drawn from
            them, with the victim's label if an image has it.
        public: the images whose mean is the other control.
    """
    images = observed.images[:, 0]
    rows = stranger_rows(kind, observed.labels[:, 0], seed)
    strange = inverter.invert({name: each[rows] for name, each in others.items()})
    figures = {
        "amortised": psnr_db(inverter.invert(observed.updates).images, images),
        "stranger": psnr_db(strange.images, images),
        "mean_image": mean_image_db(public, images),
    }
    return [Measured("psnr_db", each.tolist(), {"route": route}) for route, each in figures.items()]


def a_distance(first: Updates, second: Updates, signed: bool = False) -> float:
    """The proxy A-distance 2(1 - 2 err) of two sets of updates, in [0, 2] (Ben-David et al. 2010, section 3).

    err is the share of updates that a linear classifier puts into the wrong set. The classifier is fitted by ridge
    regression on every second update and tested on the others, then the other way round. A distance below 0 counts as
    0. The longer set is cut to the length of the shorter one.

    Args:
        first, second: name -> [n, d_out, r] of the same layers. The classifier reads them scaled to unit norm.
        signed: whether the classifier reads the entries or their absolute values. The label determines the signs: if
            labels are random in both sets, entries have mean 0 in both, and a linear classifier of the entries cannot
            tell the sets apart.
    """
    n = min(len(next(iter(each.values()))) for each in (first, second))
    rows = torch.cat([_joined_units({name: update[:n] for name, update in each.items()}) for each in (first, second)])
    rows = rows if signed else rows.abs()
    signs = torch.ones(2 * n, dtype=torch.float64)
    signs[n:] = -1
    even = torch.arange(n).repeat(2) % 2 == 0
    wrong = 0
    for fit in (even, ~even):
        mean = rows[fit].mean(0)
        centred = rows[fit] - mean
        dual, _ = fit_by_leave_one_out(gram(centred).double(), (signs[fit] - signs[fit].mean())[:, None], SHARES)
        scores = (rows[~fit] - mean) @ (centred.T @ dual.to(rows))
        wrong += int((scores[:, 0].sign() != signs[~fit]).sum())
    return max(0.0, 2 * (1 - 2 * wrong / (2 * n)))


def _joined_units(updates: Updates) -> Tensor:
    """[n, sum of d_out * r], of unit norm: the unit updates of all layers, side by side."""
    parts = [unit_rows(update) for update in updates.values()]
    return torch.cat(parts, dim=1) / len(parts) ** 0.5


def not_above(row: Row | None, control: Row | None) -> bool:
    """Whether both were measured on the same victims, and the interval of the paired difference reaches 0 or below."""
    found = None if row is None or control is None else difference(row, control)
    return found is not None and not found.positive


CONTROLS = (  # metric, column, what is tested, its control, and the words for a test that does not beat the control
    ("psnr_db", "route", "amortised", "stranger", "the amortised route by a stranger's update"),
    ("psnr_db", "route", "amortised", "mean_image", "the amortised route by the mean public image"),
    ("cosine", "decoder", "ridge", "projection", "ridge by the projection"),
    ("cosine", "decoder", "ridge", "class_mean_gradient", "ridge by the class mean gradient"),
)


def lost_to_controls(table: Table, cells: Mapping[str, Mapping[str, Value]]) -> str:
    """Which tests of CONTROLS are not shown to beat their control, with the names of the cells, as a clause.

    Args:
        cells: name -> keys of a row.

    Returns:
        "" if every test beats its control in every cell.
    """
    clauses = []
    for metric, column, tried, control, words in CONTROLS:
        pairs = {
            name: [table.one(metric, **{**keys, column: each}) for each in (tried, control)]
            for name, keys in cells.items()
        }
        names = [name for name, (row, other) in pairs.items() if not_above(row, other)]
        clauses += [f"{words} ({', '.join(names)})"] if names else []
    return "; ".join(clauses)
