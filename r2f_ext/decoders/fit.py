"""Fit several decoders in one pass over the pairs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from r2f_ext.decoders.base import Decoder, Log, no_log
from r2f_ext.decoders.checkpoint import Checkpoint
from r2f_ext.decoders.kinds import DEFAULT_KINDS, KINDS
from r2f_ext.gpu import float32_products
from r2f_ext.pairs import PairSource
from r2f_ext.progress import Advance, no_progress


@float32_products()
def fit_decoders(
    pairs: PairSource,
    count: int,
    kinds: Sequence[str] | None = None,
    advance: Advance = no_progress,
    checkpoint: Checkpoint | None = None,
    log: Log = no_log,
    precision: torch.dtype = torch.float32,
) -> list[Decoder]:
    """Fit one decoder of each of `kinds` (None: DEFAULT_KINDS, which are closed forms) to the first `count` pairs.

    Kinds that are trained by gradient descent read a few pairs a second time, to estimate their bases.

    Args:
        advance: called with the number of pairs read.
        checkpoint: saves each kind as soon as it is fitted; kinds that it already holds are loaded, not fitted.
        log: receives the training metrics of kinds that are trained by gradient descent, once per epoch.
        precision: float32 or bfloat16, the compute dtype of these kinds in training; closed forms ignore it.

    Returns:
        the fitted decoders in the order of `kinds`.

    Raises:
        R2FError: a kernel system is not positive definite, or the checkpoint cannot be written.
    """
    decoders = {kind: KINDS[kind]() for kind in kinds or DEFAULT_KINDS}
    missing = []
    for kind, decoder in decoders.items():
        if checkpoint is not None and checkpoint.holds(kind):
            decoder.load_state(checkpoint.load(kind, pairs.target.base.device), pairs)
        else:
            decoder.log, decoder.precision = log, precision
            decoder.start(pairs, count)
            missing.append(decoder)
    for batch in pairs.batches(0, count) if missing else ():
        for decoder in missing:
            decoder.observe(batch)
        advance(len(batch.labels))
    for decoder in missing:
        decoder.finish()
        if checkpoint is not None:
            checkpoint.save(decoder.kind, decoder.state())
    return list(decoders.values())
