"""`r2f fit`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from r2f_ext import distributed
from r2f_ext.cli.device import chosen_device
from r2f_ext.cli.display import drawn_stages, table
from r2f_ext.decoders import (
    ANY_A,
    ANY_A_KINDS,
    DEFAULT_KINDS,
    KINDS,
    AgnosticPairs,
    fit_decoders,
    held_out_cosines,
    save_decoders,
    shared_core,
)
from r2f_ext.decoders.base import Log, no_log
from r2f_ext.decoders.checkpoint import Checkpoint
from r2f_ext.decoders.learned import Learned
from r2f_ext.errors import R2FError
from r2f_ext.files import output_folder
from r2f_ext.models import load_base
from r2f_ext.pairs import StoredPairs
from r2f_ext.pairs.generate import PRECISIONS


def run_fit(options: argparse.Namespace) -> dict[str, Any]:
    folder = output_folder(options.out)
    pairs = StoredPairs(options.pairs, load_base(options.base, chosen_device(options)))
    held_out = min(200, len(pairs) // 5)
    if held_out < 4:
        raise R2FError(f"'{options.pairs}' holds {len(pairs)} pairs: at least 20 are needed, thousands are good.")
    kinds = _kinds_for(pairs, options.kind)
    count = len(pairs) - held_out
    checkpoint = Checkpoint(folder, f"{pairs.fingerprint}/{count}/{options.precision}")
    mine: StoredPairs | AgnosticPairs = pairs.only(pairs.target.names[distributed.rank() :: distributed.world_size()])
    with _tensorboard(options.log_dir, kinds) as log, drawn_stages() as stages:
        with stages.stage("fit", count) as advance:
            if pairs.per_victim_a:
                mine = AgnosticPairs(mine, shared_core(mine, count, checkpoint))
            decoders = fit_decoders(mine, count, kinds, advance, checkpoint, log, PRECISIONS[options.precision])
        with stages.stage("held-out", len(decoders)) as advance:
            scored = {}
            updates = mine.updates(count, count + held_out)
            for decoder in decoders:
                scored[decoder.kind] = held_out_cosines(decoder.decode(updates), mine, count, len(pairs)).summary()
                advance(1)
    parts = distributed.gather(scored)
    found = {kind: {name: figure for part in parts for name, figure in part[kind].items()} for kind in scored}
    figures = {kind: {name: found[kind][name] for name in pairs.target.names} for kind in found}
    if distributed.rank() == 0:
        parts_on_disk = [*figures, ANY_A] if pairs.per_victim_a else list(figures)
        states = {name: checkpoint.load(name, torch.device("cpu")) for name in parts_on_disk}
        save_decoders(folder, states, pairs, count)
        checkpoint.clear()
    distributed.barrier()
    rows = [
        [name, *(f"{f[name]['cosine_mean']:.3f} ({f[name]['cosine_p05']:.3f})" for f in figures.values())]
        for name in pairs.target.names
    ]
    table(f"Held-out cosine on {held_out} pairs, mean (5th percentile)", ["layer", *figures], rows)
    return {"fitted": count, "held_out": held_out, "decoders": figures}


def _kinds_for(pairs: StoredPairs, asked: list[str] | None) -> list[str] | None:
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


@contextmanager
def _tensorboard(folder: str | None, kinds: list[str] | None) -> Iterator[Log]:
    """A TensorBoard log, one file per process; `no_log` if no folder is given.

    Raises:
        R2FError: the package is missing, the folder cannot be written to, or no kind learns by gradient descent.
    """
    if folder is None:
        yield no_log
        return
    learned = [name for name, kind in KINDS.items() if issubclass(kind, Learned)]
    if not set(kinds or ()) & set(learned):
        raise R2FError(
            f"--log-dir shows kinds that learn by gradient descent: name one with --kind ({', '.join(learned)})."
        )
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise R2FError("--log-dir needs the package tensorboard: pip install tensorboard.") from error
    with SummaryWriter(str(output_folder(folder))) as writer:
        yield writer.add_scalar
