"""The decoder kinds that a fit has completed so far, saved by torch.distributed.checkpoint as safetensors.

unfinished/KIND/*.safetensors   one file per process, with the layers that it fitted
unfinished/KIND.json            identifies the pairs and settings; written after all processes have saved
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from r2f_ext import distributed
from r2f_ext.errors import R2FError, reason
from r2f_ext.files import write_text


class Checkpoint:
    """The completed decoder kinds of one fit."""

    def __init__(self, folder: Path, fitted_to: str) -> None:
        """Create no file yet.

        Args:
            folder: output folder of the decoders; the checkpoint is in its subfolder `unfinished`.
            fitted_to: identifies the pairs and settings; a checkpoint with another identifier is ignored.
        """
        self.folder, self.fitted_to = folder / "unfinished", fitted_to

    def holds(self, kind: str) -> bool:
        """Whether all processes have saved their decoders of this kind."""
        try:
            return json.loads((self.folder / f"{kind}.json").read_text()) == {"fitted_to": self.fitted_to}
        except (OSError, ValueError):
            return False

    def save(self, kind: str, state: dict[str, Tensor]) -> None:
        """Save each process's part of the decoders of one kind; all processes call it.

        Raises:
            R2FError: another process has died, or the folder cannot be written to.
        """
        part = self.folder / kind
        if distributed.rank() == 0:
            (self.folder / f"{kind}.json").unlink(missing_ok=True)
            shutil.rmtree(part, ignore_errors=True)
        distributed.barrier()
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        try:
            with _quiet():
                dcp.save(
                    plain,
                    storage_writer=HuggingFaceStorageWriter(str(part), save_distributed=True),
                    no_dist=distributed.world_size() == 1,
                )
        except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
            cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            raise R2FError(
                f"cannot save decoders in '{part}' ({reason(cause)}): free some space, or run the same command again "
                "if another process of this run has died."
            ) from error
        distributed.barrier()
        if distributed.rank() == 0:
            write_text(self.folder / f"{kind}.json", json.dumps({"fitted_to": self.fitted_to}))
        distributed.barrier()

    def load(self, kind: str, device: torch.device) -> dict[str, Tensor]:
        """The decoders of one kind, merged over all processes, on `device`."""
        with _quiet():
            reader = HuggingFaceStorageReader(str(self.folder / kind))
            state = {
                name: torch.empty(found.size, dtype=found.properties.dtype)
                for name, found in reader.read_metadata().state_dict_metadata.items()
                if isinstance(found, TensorStorageMetadata)
            }
            dcp.load(state, storage_reader=reader, no_dist=True)
        return {name: tensor.to(device) for name, tensor in state.items()}

    def clear(self) -> None:
        """Delete the checkpoint; call it after the final decoders are saved."""
        shutil.rmtree(self.folder, ignore_errors=True)


class _quiet(warnings.catch_warnings):
    """Suppresses the warning that torch.distributed.checkpoint gives in every single-process run."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")
