"""The files of an adapter folder: which may be read, and what lies beside them. Only names are looked at."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from r2f_ext.errors import R2FError, listed, plain
from r2f_ext.models.keys import refuse_foreign
from r2f_ext.models.safetensors_header import read_header, read_json

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
INDEX = f"{WEIGHTS}.index.json"
SHARD = re.compile(r"adapter_model-\d{5}-of-\d{5}\.safetensors")
MAX_SHARDS = 1000
MAX_ENTRIES = 5000  # of a folder that are looked at
MAX_BELOW = 100  # folders below a folder in which an adapter is looked for
FROM_BIN = (
    "where you trust it, convert it with PeftModel.from_pretrained(BASE, FOLDER).save_pretrained(FOLDER), which writes "
    f"{WEIGHTS}"
)
# Pattern of a name -> what such a file or folder gives away.
BESIDE = (
    (
        r"optimizer.*\.(pt|bin|pth)|optimizer(_\d+)?",
        "averages of gradients on private data (the optimiser's moments)",
    ),
    (r"rng_state.*\.pth", "the random states from which the order of the data and the dropout masks are drawn again"),
    (r"trainer_state\.json", "the number of steps, the learning rate and the loss at each logged step"),
    (r"training_args\.bin", "batch size, seed, learning rate and paths of the training"),
    (r"scheduler\.(pt|bin)", "the learning rate and the number of steps"),
    (r"scaler\.pt", "the loss scale of mixed precision"),
    (r"events\.out\.tfevents\..*", "losses over time, and whatever else was logged, such as images"),
    (r"(all|train|eval)_results\.json", "losses and the size of the training set"),
    (
        r"checkpoint-\d+|global_step\d+|pytorch_model_fsdp(_\d+)?",
        "further states of the training",
    ),
    (r"runs|wandb|mlruns|lightning_logs", "logs of the training"),
    (r"adapter_model\.bin", "a second copy of the adapter, which need not be the same"),
    (r".*\.(pt|pth|pkl|pickle|ckpt|bin|npy|npz)", "whatever was stored in it"),
    (r".*\.(png|jpe?g|webp|bmp|tiff?|gif|csv|tsv|parquet|arrow|jsonl)", "data as such"),
)


def check_folder(path: Path) -> None:
    """Check that `path` is a folder.

    Raises:
        R2FError: it is not; the sentence says what it is, and what to name instead.
    """
    where = f"'{plain(path, 400)}'"
    try:
        mode = path.stat().st_mode
    except PermissionError as error:
        raise R2FError(f"{where} may not be looked into: change the permissions of the folders above it.") from error
    except (OSError, ValueError) as error:
        raise R2FError(f"{where} does not exist: pass a folder written by PEFT's save_pretrained.") from error
    if not stat.S_ISDIR(mode):
        _refuse_file(path, mode)


def check_adapter_folder(path: Path) -> None:
    """Check that `path` is a folder with an adapter_config.json.

    Raises:
        R2FError: it is not; the sentence says what was found, and which folder or file to name instead.
    """
    check_folder(path)
    where = f"'{plain(path, 400)}'"
    if os.path.lexists(path / CONFIG):
        return
    names = names_in(path)
    inside = adapters_below(path)
    if inside:
        found = "an adapter lies in its folder" if len(inside) == 1 else "adapters lie in its folders"
        remedy = "name that one" if len(inside) == 1 else "name one of them"
        raise R2FError(f"{where} has no {CONFIG}, but {found} {listed(inside)}: {remedy}.")
    if WEIGHTS in names:
        raise R2FError(
            f"{where} has no {CONFIG}, which gives rank, scale and layers of {WEIGHTS}: save the adapter again with "
            "PEFT's save_pretrained, or copy the configuration that it was made with."
        )
    for name in names:
        if name.endswith(".safetensors"):
            _refuse_tensors(regular_file(path, name))
    raise R2FError(f"{where} has no {CONFIG}: pass a folder written by PEFT's save_pretrained.")


def weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """The safetensors files of an adapter -> the tensors that an index promises in each (None: no index).

    Raises:
        R2FError: there are none, only a pickle, or an index that names other files than shards in this folder.
    """
    where = f"'{plain(folder, 400)}'"
    if os.path.lexists(folder / WEIGHTS):
        return {regular_file(folder, WEIGHTS): None}
    if os.path.lexists(folder / INDEX):
        return {regular_file(folder, name): keys for name, keys in _shards(regular_file(folder, INDEX)).items()}
    if os.path.lexists(folder / PICKLE):
        raise R2FError(f"{where} holds its weights in {PICKLE} only, a pickle, which is never opened: {FROM_BIN}.")
    raise R2FError(f"{where} has no {WEIGHTS}: save the adapter with PEFT's save_pretrained.")


def regular_file(folder: Path, name: str) -> Path:
    """`folder`/`name`, checked to be a file of this folder.

    A link is followed where it stays in the folder, or leads from a snapshot of the Hugging Face cache to its blobs.

    Raises:
        R2FError: it is missing, or a link that leads elsewhere or to nothing.
    """
    path = folder / name
    if not os.path.lexists(path):
        raise R2FError(f"{plain(path, 400)} does not exist: copy the whole folder again.")
    if path.is_symlink():
        home = folder.resolve()
        target = Path(os.path.realpath(path))
        allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
        if not any(target.is_relative_to(place) for place in allowed):
            raise R2FError(f"{plain(path, 400)} links out of its folder, which is not followed: copy the file there.")
        if not target.exists():
            raise R2FError(f"{plain(path, 400)} is a link to a file that does not exist: copy the file there.")
    return path


def adapters_below(folder: Path, depth: int = 2) -> list[str]:
    """Relative paths of the folders below that hold an adapter_config.json, links not followed."""
    found = []
    for name in _folders_in(folder)[:MAX_BELOW]:
        if os.path.lexists(folder / name / CONFIG):
            found.append(name)
        elif depth > 1:
            found.extend(f"{name}/{inner}" for inner in adapters_below(folder / name, depth - 1))
    return found


def names_in(folder: Path) -> list[str]:
    """Sorted names in a folder, at most `MAX_ENTRIES` of them; none where it may not be read."""
    return sorted(entry.name for entry in _entries(folder))


def _folders_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in _entries(folder) if entry.is_dir(follow_symlinks=False))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(islice(entries, MAX_ENTRIES))
    except OSError:
        return []


def leaks_beside(folder: Path) -> Iterator[str]:
    """A sentence for each kind of file in the folder that gives away something of the training. None is opened."""
    kinds: dict[str, list[str]] = {}
    for name in names_in(folder):
        reason = next((reason for pattern, reason in BESIDE if re.fullmatch(pattern, name)), None)
        if reason is not None:
            kinds.setdefault(reason, []).append(name)
    for reason, names in kinds.items():
        lies, it = ("lies", "it") if len(names) == 1 else ("lie", "them")
        yield (
            f"{listed(names, 4)} {lies} beside the adapter; a file of this kind gives away {reason}. "
            f"It was not opened; do not share {it}."
        )


def _shards(index: Path) -> dict[str, set[str]]:
    """Name of a shard -> the tensors that the index promises in it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise R2FError(f"{plain(index, 400)} names no tensors (weight_map): save the adapter again with PEFT.")
    shards: dict[str, set[str]] = {}
    for key, name in weight_map.items():
        if not isinstance(name, str) or not SHARD.fullmatch(name):
            raise R2FError(
                f"{plain(index, 400)} names the file '{plain(name)}', which is no shard of this folder "
                "(adapter_model-00001-of-00002.safetensors): save the adapter again."
            )
        shards.setdefault(name, set()).add(key)
    if len(shards) > MAX_SHARDS:
        raise R2FError(f"{plain(index, 400)} names {len(shards)} shards, more than the {MAX_SHARDS} of any adapter.")
    return shards


def _refuse_file(path: Path, mode: int) -> None:
    where = f"'{plain(path, 400)}'"
    if path.name in (CONFIG, WEIGHTS, PICKLE):
        raise R2FError(f"{where} is a file of an adapter: pass the folder that holds it, '{plain(path.parent, 400)}'.")
    if stat.S_ISREG(mode) and path.suffix == ".safetensors":
        _refuse_tensors(path)
    raise R2FError(f"{where} is not a folder: pass the folder with {CONFIG} that PEFT's save_pretrained wrote.")


def _refuse_tensors(path: Path) -> None:
    """Refuse a safetensors file without a configuration: by the program that it is of, if its tensors' names say so."""
    refuse_foreign([entry.name for entry in read_header(path)], f"'{plain(path, 400)}'")
    raise R2FError(
        f"'{plain(path, 400)}' comes without {CONFIG}, which gives rank, scale and layers: pass a folder that PEFT's "
        "save_pretrained wrote."
    )
