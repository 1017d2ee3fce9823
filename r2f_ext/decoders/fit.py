"""Fit several decoders in one pass over the pairs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from r2f_ext.decoders.base import Decoder, Log, no_log
from r2f_ext.decoders.checkpoint import Checkpoint
from r2f_ext.decoders.kinds import DEFAULT_KINDS, KINDS
from r2f_ext.pairs import PairSource
from r2f_ext.progress import Advance


def fit_decoders(
    pairs: PairSource,
    count: int,
    kinds: Sequence[str] | None = None,
    advance: Advance = lambda units: None,
    checkpoint: Checkpoint | None = None,
    log: Log = no_log,
    precision: torch.dtype = torch.float32,
) -> list[Decoder]:
    """Fit one decoder of each of `kinds` (None: the closed-form default ones) to the first `count` pairs.

    Kinds that learn by gradient descent read a few pairs more than once, to find their bases.

    Args:
        advance: called with the number of pairs read.
        checkpoint: takes each kind as soon as it is fitted, and gives back those that it has.
        log: called with figures of the training of kinds that learn by gradient descent, epoch by epoch.
        precision: float32 or bfloat16, what these kinds compute in while they learn; closed forms ignore it.
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
