"""`r2f fit`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from r2f_ext.cli.device import chosen_device
from r2f_ext.cli.display import drawn_stages, table
from r2f_ext.decoders import KINDS, fit_folder
from r2f_ext.decoders.base import Log, no_log
from r2f_ext.decoders.learned import Learned
from r2f_ext.errors import R2FError
from r2f_ext.files import output_folder
from r2f_ext.models import load_base
from r2f_ext.pairs import StoredPairs
from r2f_ext.pairs.generate import PRECISIONS


def run_fit(options: argparse.Namespace) -> dict[str, Any]:
    folder = output_folder(options.out)
    pairs = StoredPairs(options.pairs, load_base(options.base, chosen_device(options)))
    with _tensorboard(options.log_dir, options.kind) as log, drawn_stages() as stages:
        found = fit_folder(pairs, folder, options.kind, stages, log, PRECISIONS[options.precision])
    rows = [
        [name, *(f"{f[name].cosine_mean:.3f} ({f[name].cosine_p05:.3f})" for f in found.decoders.values())]
        for name in pairs.target.names
    ]
    title = f"Held-out cosine on {found.held_out} pairs, mean (5th percentile)"
    table(title, ["layer", *found.decoders], rows)
    return asdict(found)


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
