"""Finished searches, kept in a folder until a run ends in which no route failed, so that another run can continue.

The name of a file is a hash of everything that decides the search but the compiled extension, so another adapter, base,
proxy, setting or form of the Python code never finds it. Only the point and the residuals are kept; whether the image
is exact is computed anew from the adapter.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import r2f_ext
from r2f_ext import __version__
from r2f_ext.files import sha256_of, write_tensors
from r2f_ext.inversion.newton import Search
from r2f_ext.types import Target

NAME = re.compile(r"search-\w+-[0-9a-f]{64}\.safetensors")


@dataclass(frozen=True)
class SavedSearches:
    """A folder to keep searches in.

    Attributes:
        folder: it exists.
        decided_by: what proxies and start are made of, as text: fingerprints of images, seeds, precision.
    """

    folder: Path
    decided_by: str

    def clear(self) -> None:
        """Remove every kept search of the folder, also of other commands: no report of theirs is left to be
        finished."""
        for path in self.folder.glob("search-*.safetensors"):
            if NAME.fullmatch(path.name):
                path.unlink(missing_ok=True)


@dataclass(frozen=True)
class SearchFiles:
    """The files of V searches; `keys`: V hashes of everything that decides them."""

    folder: Path
    route: str
    keys: tuple[str, ...]

    def path(self, victim: int) -> Path:
        return self.folder / f"search-{self.route}-{self.keys[victim]}.safetensors"

    def unrelated(self) -> int:
        """How many searches by this route the folder keeps that other inputs, settings or versions made."""
        own = {self.path(victim).name for victim in range(len(self.keys))}
        found = (path.name for path in self.folder.glob(f"search-{self.route}-*.safetensors"))
        return sum(1 for name in found if NAME.fullmatch(name) and name not in own)

    def write(self, victim: int, found: Search) -> None:
        """Keep a search that has ended.

        Raises:
            R2FError: the file cannot be written.
        """
        numbers = found.residual, found.start_residual, found.passes, found.stopped, found.seconds, found.noise
        figures = torch.tensor(numbers, dtype=torch.float64)
        about = {"made_for": self.keys[victim], "sha256": sha256_of([found.image, figures])}
        write_tensors(self.path(victim), {"image": found.image, "figures": figures}, about)

    def read(self, victim: int, start: Tensor) -> Search | None:
        """The kept search from this start [c * h * w]; None where there is none.

        Raises:
            ValueError: there is a file, but not one that `write` wrote for this search.
        """
        path = self.path(victim)
        if not path.exists():
            return None
        try:
            if not path.is_file():
                raise ValueError("not a file")
            with safe_open(path, "pt") as file:
                about, shape = file.metadata() or {}, file.get_slice("image").get_shape()
                if about.get("made_for") != self.keys[victim] or shape != list(start.shape):
                    raise ValueError("made for another search")
                image, figures = file.get_tensor("image"), file.get_tensor("figures")
        except (SafetensorError, OSError) as error:
            raise ValueError("unreadable") from error
        if (image.dtype, figures.dtype, figures.shape) != (start.dtype, torch.float64, (6,)):
            raise ValueError("made for another search")
        inside = bool(((image >= 0) & (image <= 1)).all())
        if about.get("sha256") != sha256_of([image, figures]) or not inside:
            raise ValueError("changed since it was written")
        residual, start_residual, passes, stopped, seconds, noise = figures.tolist()
        return Search(image.to(start.device), residual, start_residual, int(passes), bool(stopped), seconds, noise)


def files_of(
    saved: SavedSearches | None,
    route: str,
    settings: object,
    target: Target,
    common: dict[str, Tensor],
    victims: Sequence[dict[str, Tensor]],
    labels: Tensor | None,
) -> SearchFiles | None:
    """The files of V victims' searches by one route; None where none are kept, or no label is known to search with.

    Args:
        settings: of the search; their repr is hashed.
        common: tensors that all victims share, such as A.
        victims: the tensors that were observed of each.
        labels: int64 [V] that the searches assume.
    """
    if saved is None or labels is None:
        return None
    base = target.base
    shared = (
        *(__version__, _code(), saved.decided_by, route, repr(settings), repr(target.layers)),
        *(base.device.type, repr((base.mean, base.std)), sha256_of(base.model.state_dict().values()), _hashed(common)),
    )
    keys = (
        hashlib.sha256(json.dumps([*shared, label, _hashed(victim)]).encode()).hexdigest()
        for victim, label in zip(victims, labels.tolist(), strict=True)
    )
    return SearchFiles(saved.folder, route, tuple(keys))


def by_victim(observed: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """name -> [V, ...] as V mappings name -> [...]."""
    return [dict(zip(observed, parts, strict=True)) for parts in zip(*observed.values(), strict=True)]


@cache
def _code() -> str:
    """A hash of the package's Python modules: between two releases they change, and the version does not."""
    folder = Path(r2f_ext.__file__).parent
    found = hashlib.sha256()
    for module in sorted(folder.rglob("*.py")):
        found.update(f"{module.relative_to(folder)}\n".encode() + module.read_bytes())
    return found.hexdigest()


def _hashed(tensors: dict[str, Tensor]) -> list[str]:
    return [*map(str, tensors), sha256_of(tensors.values())]
