"""Amortised inversion whose pairs are made label by label, only for the victims' labels (docs/methods.md, 3d).

A first estimate reads all public images of a label, as far as their pairs fit into memory; a second one those images,
of many more, that are nearest to the first.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from r2f_ext.data import ImageSet, ProxyImages, unseen_rows
from r2f_ext.errors import R2FError
from r2f_ext.inversion.amortised import LABEL_PAIRS, MIN_PAIRS, OWN_PAIRS, AmortisedInverter
from r2f_ext.inversion.near_images import VARIANTS, near_images, streamed, variants
from r2f_ext.pairs import GeneratedPairs, SimulatedPairs, Training
from r2f_ext.progress import Advance, no_progress
from r2f_ext.types import Reconstruction, Target

# Most images near one estimate that make pairs, and most for all estimates of a label: at most as many as the label has
# images, but if these are fewer than NEAR_LEAST, up to so many.
NEAR_EACH, NEAR_PAIRS, NEAR_LEAST = 4000, 8000, 1000


@dataclass(frozen=True)
class Amortised:
    """The reconstruction by `invert_by_label`, and bool [V]: victims whose update resembles no proxy update."""

    reconstruction: Reconstruction
    far_from_proxy: Tensor


def invert_by_label(
    target: Target,
    a: dict[str, Tensor],
    proxy: ImageSet,
    observed: dict[str, Tensor],
    advance: Advance = no_progress,
    precision: str = "float32",
    labels: Tensor | None = None,
    most: int | None = None,
    training: Training | None = None,
) -> Amortised:
    """The amortised route at any proxy size: pairs are made label by label, only for the victims' labels.

    If the proxy's labels are random, all its images are used for every label; otherwise only the images of the label.

    Args:
        a: name -> the victims' common A [r, d_in]; observed: name -> their updates [V, d_out, r].
        advance: called with the number of pairs made.
        precision: of the model (see `GeneratedPairs`).
        labels: int64 [V], the victims'; None: found from up to LABEL_PAIRS further pairs.
        most: maximum number of images per label; None: all are used. Their updates and kernel are in memory, for one
            label at a time.
        training: the victims' recipe, with one image each, which the pairs follow too; None: one plain step.

    Raises:
        R2FError: fewer than 20 images in the proxy, or `most` is less.
    """
    began = time.perf_counter()
    _check_most(most)
    if labels is None:
        first = proxy.take(torch.arange(min(LABEL_PAIRS, len(proxy))))
        labels = _inverter(target, a, first, advance, precision, training).find_labels(observed)
    images = labels.new_empty(len(labels), *target.base.input_shape, dtype=torch.float32)
    far = torch.zeros_like(labels, dtype=torch.bool)
    pairs = held_out = 0.0
    errors: dict[int, Tensor] = {}
    for label in labels.unique().tolist():
        victims = labels == label
        own = proxy_of_label(proxy, label, most)
        inverter = _inverter(target, a, own, advance, precision, training)
        part = {name: update[victims] for name, update in observed.items()}
        found = inverter.invert(part, labels[victims])
        images[victims], far[victims] = found.images, inverter.far_from_proxy(part, labels[victims])
        errors |= found.loo_errors
        share = float(victims.float().mean())
        pairs += share * found.details["pairs_a_victim"]
        held_out += share * found.details["held_out_psnr_db"]
        del inverter  # before the next one takes as much memory
    why = f"statistical estimate by kernel ridge from {pairs:.0f} proxy pairs of the victim's label"
    if most is not None and pairs_by_label(proxy, labels, None) > pairs_by_label(proxy, labels, most):
        why += f"; of its images no more than {most} were used, as many as fit into memory"
    details = {"held_out_psnr_db": held_out, "pairs_a_victim": pairs}
    reconstruction = Reconstruction(
        "amortised", images, labels, why, time.perf_counter() - began, details, loo_errors=errors
    )
    return Amortised(reconstruction, far)


def invert_nearby(
    target: Target,
    a: dict[str, Tensor],
    proxy: ImageSet,
    observed: dict[str, Tensor],
    first: Reconstruction,
    generated: ProxyImages | None = None,
    private: Tensor | None = None,
    advance: Advance = no_progress,
    precision: str = "float32",
    most: int | None = None,
    training: Training | None = None,
) -> Reconstruction:
    """A second estimate: kernel ridge on pairs of those images that are nearest to the first one.

    They are chosen among `generated` images or, where there are none, among the variants of those images of `proxy`
    that `invert_by_label` uses for the label (see `near_images.variants`).

    Args:
        first: images [V, c, h, w] and labels [V].
        generated: images that are good for any label.
        private: images uint8 [n, c, h, w] that are not used.
        advance: called with the number of candidates that were compared.
        others: see `invert_by_label`.

    Raises:
        R2FError: fewer than 20 candidates, or `most` is less.
    """
    began, images, pairs = time.perf_counter(), first.images.clone(), 0.0
    errors: dict[int, Tensor] = {}
    assert first.labels is not None
    _check_most(most)
    for label, victims, near in _near(proxy, first, generated, most, advance):
        near = near if private is None else near[unseen_rows(near, private)]
        chosen = ImageSet(proxy.name, near, torch.full((len(near),), label))
        inverter = _inverter(target, a, _shuffled(chosen), no_progress, precision, training)
        own = {name: update[victims] for name, update in observed.items()}
        found = inverter.invert(own, first.labels[victims])
        images[victims] = found.images
        errors |= found.loo_errors
        pairs += float(victims.float().mean()) * len(near)
        del inverter  # before the next one takes as much memory
    why = f"statistical estimate by kernel ridge from {pairs:.0f} public images that are near an earlier estimate"
    seconds, details = time.perf_counter() - began, {"near_pairs": pairs}
    return replace(first, images=images, why=why, seconds=seconds, details=details, loo_errors=errors)


def candidates_nearby(proxy: ImageSet, labels: Tensor, generated: ProxyImages | None) -> int:
    """How many candidates `invert_nearby` compares for victims of these labels [V]."""
    if generated is not None:
        return len(generated)
    return VARIANTS * sum(len(_rows_of_label(proxy, one[0], None)) for one in _screened(proxy, labels, False))


def _near(
    proxy: ImageSet, first: Reconstruction, generated: ProxyImages | None, most: int | None, advance: Advance
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each label, its victims, bool [V], and the images near their estimates, uint8 [n, c, h, w], the nearest first."""
    labels, shape = first.labels, first.images.shape[1:]
    assert labels is not None
    for group in _screened(proxy, labels, generated is not None):
        rows = _rows_of_label(proxy, group[0], None)
        limit = min(NEAR_PAIRS, max(NEAR_LEAST, len(rows)))
        limit = limit if most is None else min(limit, most)
        candidates = variants(proxy.images, rows) if generated is None else streamed(generated, shape)
        together = torch.isin(labels, labels.new_tensor(group))
        own = labels[together].cpu()
        counts = torch.tensor([_near_each(int((own == label).sum()), limit) for label in own])
        images, places = near_images(_counted(candidates, advance), first.images[together], counts)
        for label in group:
            of_label = torch.stack([place for place, its in zip(places, own.tolist(), strict=True) if its == label])
            nearest_first = list(dict.fromkeys(of_label.T.flatten().tolist()))
            yield label, labels == label, images[nearest_first[:limit]]


def _screened(proxy: ImageSet, labels: Tensor, generated: bool) -> list[list[int]]:
    """The labels [V] in groups that have the same candidates."""
    found = labels.unique().tolist()
    return [found] if generated or proxy.random_labels else [[label] for label in found]


def _near_each(victims: int, limit: int) -> int:
    """How many images near each of this many estimates of a label make pairs; `limit`: for all of them."""
    return max(MIN_PAIRS, min(NEAR_EACH, limit // victims))


def _check_most(most: int | None) -> None:
    if most is not None and most < MIN_PAIRS:
        raise R2FError(f"pairs of only {most} images of a label fit into memory: use a machine with more.")


def _counted(chunks: Iterator[Tensor], advance: Advance) -> Iterator[Tensor]:
    for chunk in chunks:
        yield chunk
        advance(len(chunk))


def _shuffled(images: ImageSet) -> ImageSet:
    """In random order, because settings are chosen on the first ones."""
    return images.take(torch.randperm(len(images), generator=torch.Generator().manual_seed(0)))


def pairs_by_label(proxy: ImageSet, labels: Tensor, most: int | None) -> int:
    """How many pairs `invert_by_label` makes for victims of these labels [V]."""
    return sum(len(_rows_of_label(proxy, label, most)) for label in labels.unique().tolist())


def proxy_of_label(proxy: ImageSet, label: int, most: int | None = None) -> ImageSet:
    """Images of `proxy` to fit the regression for `label` to: those of the label, or all if fewer than OWN_PAIRS have
    it.

    Args:
        most: a random choice of this many, if there are more.
    """
    chosen = proxy.take(_rows_of_label(proxy, label, most))
    return chosen.relabelled(label) if proxy.random_labels else chosen


def _rows_of_label(proxy: ImageSet, label: int, most: int | None) -> Tensor:
    rows = torch.arange(len(proxy))
    if not proxy.random_labels:
        own = torch.nonzero(proxy.labels == label).flatten()
        rows = own if len(own) >= OWN_PAIRS else rows
    if most is None or most >= len(rows):
        return rows
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:most]].sort().values


def _inverter(
    target: Target,
    a: dict[str, Tensor],
    proxy: ImageSet,
    advance: Advance,
    precision: str,
    training: Training | None,
) -> AmortisedInverter:
    pairs: GeneratedPairs | SimulatedPairs = GeneratedPairs(target, a, proxy, precision=precision)
    if training is not None:
        pairs = SimulatedPairs(target, a, proxy, training, precision=precision)
    parts: dict[str, list[Tensor]] = {name: [] for name in target.names}
    for batch in pairs.batches():
        for name, update in batch.updates.items():
            parts[name].append(update.flatten(1))
        advance(len(batch.labels))
    # Concatenated layer by layer, which frees the parts early: peak memory stays below two copies of all updates.
    updates = {name: torch.cat(parts.pop(name)) for name in target.names}
    device = target.base.device
    images, labels = proxy.batch(slice(None), device), proxy.labels.to(device)
    return AmortisedInverter(updates, images, labels, target.base.num_classes)
