"""Pairs of victims of a given recipe from proxy images that are named: what `r2f pairs` makes."""

from __future__ import annotations

from torch import Tensor

from r2f_ext.data import ProceduralStream, ProxyImages, images_for
from r2f_ext.pairs.generate import GeneratedPairs
from r2f_ext.pairs.simulation import SimulatedPairs, Training
from r2f_ext.types import BaseModel, Target


def pairs_from_images(
    target: Target,
    a: dict[str, Tensor],
    proxy: str,
    count: int,
    training: Training | None = None,
    *,
    seed: int = 0,
    per_victim_a: bool = False,
    dense: bool = False,
    precision: str = "float32",
) -> GeneratedPairs | SimulatedPairs:
    """Pairs of up to `count` victims: in one pass each where one plain step is all of their training, else simulated.

    Args:
        a: name -> A [r, d_in] that the victims start from.
        proxy: name or folder of the images, see `images_for`; "procedural" is generated as it is read.
        training: of a victim, which takes `training.owned` images; None: one SGD step on one image.
        seed: of the images, of the batches of a simulated training, and of the victims' own A.
        per_victim_a: every victim draws an A of its own instead of `a`.
        dense: simulated pairs keep whole gradients, see `SimulatedPairs`.
        precision: see `GeneratedPairs`.

    Raises:
        R2FError: see `images_for`, `GeneratedPairs` and `SimulatedPairs`.
    """
    images = _images(target.base, proxy, count * (1 if training is None else training.owned), seed)
    a_seed = seed if per_victim_a else None
    if training is None or training.plain_step:
        return GeneratedPairs(target, a, images, 1 if training is None else training.batch, precision, a_seed)
    return SimulatedPairs(target, a, images, training, seed, None, a_seed, dense, precision)


def _images(base: BaseModel, proxy: str, count: int, seed: int) -> ProxyImages:
    if proxy == "procedural" and count > 0:  # `images_for` raises the error for a count below 1
        return ProceduralStream(count, base.input_shape, base.num_classes, seed, base.device)
    return images_for(base, proxy, count=count, seed=seed)
