"""Decoders of pairs on disk, fitted into a folder and applied from it: what `r2f fit` and `r2f decode` do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from r2f_ext import distributed
from r2f_ext.decoders.agnostic import ANY_A, ANY_A_KINDS, AgnosticPairs, shared_core
from r2f_ext.decoders.base import Log, no_log, stack_updates, with_saved
from r2f_ext.decoders.checkpoint import Checkpoint
from r2f_ext.decoders.evaluate import Accuracy, held_out_cosines
from r2f_ext.decoders.fit import fit_decoders
from r2f_ext.decoders.kinds import DEFAULT_KINDS
from r2f_ext.decoders.store import load_core, load_decoder, save_decoders
from r2f_ext.errors import R2FError
from r2f_ext.gpu import float32_products
from r2f_ext.pairs import StoredPairs
from r2f_ext.progress import Stages
from r2f_ext.types import Gradient, LoraUpdate, Target

MOST_HELD_OUT, LEAST_HELD_OUT = 200, 4  # pairs that the decoders are not fitted to: at most a fifth of all

Accuracies = dict[str, dict[str, Accuracy]]  # kind -> layer -> accuracy


@dataclass(frozen=True)
class FittedFolder:
    """Decoders that have just been written to a folder.

    Attributes:
        fitted: number of pairs that they are fitted to; held_out: number of the pairs after these.
        decoders: kind -> layer -> accuracy on the held-out pairs.
    """

    fitted: int
    held_out: int
    decoders: Accuracies


def fit_folder(
    pairs: StoredPairs,
    folder: Path,
    kinds: Sequence[str] | None = None,
    stages: Stages | None = None,
    log: Log = no_log,
    precision: torch.dtype = torch.float32,
) -> FittedFolder:
    """Fit decoders to all pairs but the last ones, measure them on those, and write them to `folder`.

    Kinds that have been fitted are kept in the folder until all are, so that an interrupted call resumes. Under
    torchrun each process fits its share of the layers, and the first one writes.

    Args:
        kinds: names in KINDS; None: DEFAULT_KINDS, where they apply to the pairs.
        stages: takes the time of the stages "fit" and "held-out".
        log, precision: see `fit_decoders`.

    Raises:
        R2FError: too few pairs, a kind that does not apply to pairs with an A each, or a file cannot be written.
    """
    stages = stages or Stages()
    kinds, held_out = _kinds_for(pairs, kinds), _held_out(pairs)
    count = len(pairs) - held_out
    checkpoint = Checkpoint(folder, f"{pairs.fingerprint}/{count}/{str(precision).removeprefix('torch.')}")
    mine: StoredPairs | AgnosticPairs = pairs.only(pairs.target.names[distributed.rank() :: distributed.world_size()])
    with stages.stage("fit", count) as advance:
        if pairs.per_victim_a:
            mine = AgnosticPairs(mine, shared_core(mine, count, checkpoint))
        decoders = fit_decoders(mine, count, kinds, advance, checkpoint, log, precision)
    with stages.stage("held-out", len(decoders)) as advance:
        scored = {}
        updates = mine.updates(count, len(pairs))
        for decoder in decoders:
            scored[decoder.kind] = held_out_cosines(decoder.decode(updates), mine, count, len(pairs)).summary()
            advance(1)
    figures = _of_all_layers(scored, pairs)
    if distributed.rank() == 0:
        saved = [*figures, ANY_A] if pairs.per_victim_a else list(figures)
        save_decoders(folder, {name: checkpoint.load(name, torch.device("cpu")) for name in saved}, pairs, count)
        checkpoint.clear()
    distributed.barrier()
    return FittedFolder(count, held_out, figures)


@float32_products()
def decode_from_folder(
    folder: Path, kind: str, pairs: StoredPairs, target: Target, adapters: Sequence[LoraUpdate]
) -> Gradient:
    """The gradients of V adapters that share one A, by a decoder that `fit_folder` wrote.

    Args:
        pairs: those that the decoder was fitted to.

    Returns:
        [V, d_out, d_in] a layer, times the victims' learning rates; saved modules as their files hold them.

    Raises:
        R2FError: the pairs are of other layers or of another A, or see `load_decoder`.
    """
    updates = stack_updates(list(adapters))
    if pairs.per_victim_a:
        if pairs.target.layers != target.layers:
            raise R2FError(f"the pairs in '{pairs.folder}' are of other layers, rank or alpha: make new ones.")
        projected = AgnosticPairs(pairs, load_core(folder, pairs))
        decoded = load_decoder(folder, kind, pairs, projected).decode(projected.view(updates, adapters[0].start))
    else:
        pairs.check_same_a(adapters[0])
        decoded = load_decoder(folder, kind, pairs).decode(updates)
    return with_saved(target, updates, decoded)


def _held_out(pairs: StoredPairs) -> int:
    held_out = min(MOST_HELD_OUT, len(pairs) // 5)
    if held_out < LEAST_HELD_OUT:
        raise R2FError(f"'{pairs.folder}' holds {len(pairs)} pairs: at least 20 are needed, thousands are good.")
    return held_out


def _kinds_for(pairs: StoredPairs, asked: Sequence[str] | None) -> Sequence[str] | None:
    """The kinds to fit; pairs with one A per victim need kinds that apply to any A."""
    if not pairs.per_victim_a:
        return asked
    for kind in asked or ():
        if kind not in ANY_A_KINDS:
            raise R2FError(
                f"each victim of '{pairs.folder}' has an A of its own, and {kind} decodes one A only: choose "
                f"{', '.join(ANY_A_KINDS)}, or make pairs without --per-victim-a."
            )
    return asked or [kind for kind in DEFAULT_KINDS if kind in ANY_A_KINDS]


def _of_all_layers(scored: Accuracies, pairs: StoredPairs) -> Accuracies:
    """The accuracy that all processes measured, each on its own layers, in the order of the target's layers."""
    found: Accuracies = {kind: {} for kind in scored}
    for part in distributed.gather(scored):
        for kind, layers in part.items():
            found[kind] |= layers
    return {kind: {name: layers[name] for name in pairs.target.names} for kind, layers in found.items()}
