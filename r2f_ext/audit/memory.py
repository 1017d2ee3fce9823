"""Sizes of an audit that fit into memory, computed before the long stages."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from r2f_ext.config import AuditConfig
from r2f_ext.errors import R2FError
from r2f_ext.gpu import free_memory
from r2f_ext.types import Target

FLOAT = 4
SHARE = 0.7  # of the memory that is free now


def fit_to_memory(
    target: Target,
    victims: int,
    count: int,
    config: AuditConfig,
    free: int | None = None,
    fewer: str = "ask for at most {} (--count)",
) -> AuditConfig:
    """Return `config` with the number of held-out pairs that fit; their dense gradients dominate for a large base.

    Args:
        victims: number of adapters to decode.
        count: number of proxy pairs.
        free: available memory in bytes; None: that of the base's device.
        fewer: the remedy, with {} for the number of pairs that fit.

    Raises:
        R2FError: not even the pairs fit; the sentence says how many would.
    """
    free = int(SHARE * (free_memory(target.base.device) if free is None else free))
    update, image = _bytes_of_a_pair(target)
    gradient = FLOAT * sum(layer.d_out * layer.d_in for layer in target.layers)
    # Three copies each of updates (collected, unit rows, temporary), images (targets, dual weights, temporary), kernel.
    pairs = count * (3 * update + 3 * image) + 3 * FLOAT * count**2
    fitted = min(config.decoder_pairs, count)
    factors = FLOAT * fitted**2 * (2 * len(target.layers) + 1)
    left = free - pairs - factors - 2 * victims * gradient
    held_out = min(config.held_out, left // (2 * gradient))
    if held_out < min(4, config.held_out):
        square = (3 + 2 * (len(target.layers) + 1)) * FLOAT
        fits = _largest(free - 2 * (victims + 4) * gradient, 3 * update + 3 * image, square)
        remedy = fewer.format(fits) if fits >= 40 else "use a device with more memory"
        raise R2FError(
            f"{count} pairs of '{target.base.spec}' do not fit into {free / 1e9:.0f} GB of memory: {remedy}."
        )
    return replace(config, held_out=held_out)


def start_images(target: Target, count: int, public: int, free: int | None = None) -> int:
    """How many images of a label, of at most `public`, fit into memory for Gauss-Newton's start, beside `count` pairs.

    Args:
        free: available memory in bytes; None: that of the base's device.
    """
    free = int(SHARE * (free_memory(target.base.device) if free is None else free))
    update, image = _bytes_of_a_pair(target)
    held = count * 2 * (update + image)  # updates and unit rows
    # Two copies each of updates and images, and the kernel with two temporaries.
    return min(public, _largest(free - held, 2 * (update + image), 3 * FLOAT))


def _bytes_of_a_pair(target: Target) -> tuple[int, int]:
    """Of an update of all layers, and of an image."""
    return FLOAT * sum(layer.d_out * layer.rank for layer in target.layers), FLOAT * prod(target.base.input_shape)


def _largest(free: int, row: int, square: int) -> int:
    """Largest n with n * row + n^2 * square <= free, or 0."""
    return int(((row**2 + 4 * square * max(0, free)) ** 0.5 - row) / (2 * square))
