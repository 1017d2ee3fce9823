"""The searches of V victims from one start, with a line on each as it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from math import floor

import torch
from torch import Tensor

from r2f_ext.errors import R2FError
from r2f_ext.forked import processes_for, shared
from r2f_ext.inversion.exactness import Bound
from r2f_ext.inversion.newton import Search
from r2f_ext.inversion.saved_searches import SearchFiles
from r2f_ext.inversion.side_by_side import CPU_TOGETHER
from r2f_ext.progress import Advance
from r2f_ext.types import Reconstruction

# Victims, their start points [n, c * h * w] and labels [n] -> each victim and its search, as they end.
Find = Callable[[Sequence[int], Tensor, Tensor], Iterator[tuple[int, Search]]]


def one_by_one(find: Callable[[int, Tensor, Tensor], Search]) -> Find:
    """Searches that run one after another; `find` takes a victim, its start point [c * h * w] and its label [1]."""

    def each(victims: Sequence[int], points: Tensor, labels: Tensor) -> Iterator[tuple[int, Search]]:
        for victim, point, label in zip(victims, points, labels, strict=True):
            yield victim, find(victim, point, label[None])

    return each


def search_each(
    route: str,
    start: Reconstruction,
    find: Find,
    bound: Callable[[int, Tensor, Tensor], Bound],
    advance: Advance,
    doubt: str | None = None,
    files: SearchFiles | None = None,
    memory: int | None = None,
) -> Reconstruction:
    """Run one search per victim; its image replaces the start if its residual is small or far below the start's.

    Args:
        start: images [V, c, h, w] in [0, 1] and labels [V] that the searches begin from.
        find: runs the searches of victims without a kept search, each only when its result is asked for.
        bound: (victim, image found [c * h * w], label [1]) -> what the update says of it; for images that replace the
            start, unless there is a doubt.
        advance: called with 1 and a line after each victim.
        doubt: why none can be called exact, as a clause.
        files: where each search is kept once it has ended, and taken from if it is there; None: nowhere.
        memory: bytes of a process for up to CPU_TOGETHER victims; forked processes may then share the victims (see
            `forked`), and searches run ahead of what is asked for. None: they run in the present process.

    Returns:
        `per_victim` holds `residual`, `start_residual`, `passes`, `search_seconds`, `stopped` and `exact` (1 or 0),
        `bound_db`, `free_directions` and `misfit` (see `Bound`; NaN where not computed); `details` how many are exact.

    Raises:
        R2FError: the start has no labels, or a process was killed.
    """
    began = time.perf_counter()
    if start.labels is None:
        raise R2FError(f"{route} needs labels: start it from a route that finds them.")
    if files is not None and (unrelated := files.unrelated()):
        which, verb = ("search", "is") if unrelated == 1 else ("searches", "are")
        others = f"{unrelated} kept {which} {verb} of other adapters, images, settings or code"
        advance(0, f"{others} and {verb} not used")
    points, labels = start.images.flatten(1), start.labels
    kept, remarks = zip(*(_read(victim, point, files) for victim, point in enumerate(points)), strict=True)

    def judged(victims: Sequence[int]) -> Iterator[tuple[int, Search | Bound]]:
        """Each victim's search, and then its bound."""
        for victim, found in _in_turn(victims, points, labels, find, kept):
            yield victim, found
            known = found.improved and doubt is None
            yield victim, bound(victim, found.image, labels[victim, None]) if known else Bound()

    left = [victim for victim, search in enumerate(kept) if search is None]
    processes = 1 if memory is None else processes_for(len(left or kept), memory)
    figures: list[dict[str, float]] = [{} for _ in start.images]
    images, searches, said = start.images.clone(), dict[int, Search](), list(remarks)
    with closing(shared(judged, _groups(kept, left, processes), processes)) as results:
        for victim, result in results:
            if isinstance(result, Search):
                searches[victim] = result
                said[victim] += _write(victim, result, files) if kept[victim] is None else ""
                continue
            found = searches[victim]
            figures[victim] = _figures(found, result)
            if found.improved:
                images[victim] = found.image.view_as(images[victim])
            of = f"search {sum(map(bool, figures))} of {len(images)} (victim {victim + 1})"
            so_far = sum(bool(each.get("exact")) for each in figures)
            advance(1, f"{of}: {_words(found, result)}; {so_far} exact so far{said[victim]}")
    per_victim = {key: torch.tensor([float(each[key]) for each in figures], dtype=torch.float64) for key in figures[0]}
    exact = int(per_victim["exact"].sum())
    why = f"Gauss-Newton on the update itself: {exact} of {len(images)} images are exact"
    if doubt is not None:
        why += f", because {doubt}"
    if stopped := int(per_victim["stopped"].sum()):
        why += f"; the time limit stopped {stopped} of {len(images)} searches"
    seconds, details = time.perf_counter() - began, {"exact": float(exact)}
    return Reconstruction(route, images, start.labels, why, seconds, details, per_victim=per_victim, doubt=doubt)


def _figures(found: Search, known: Bound) -> dict[str, float]:
    return {
        "residual": found.residual,
        "start_residual": found.start_residual,
        "passes": found.passes,
        "search_seconds": found.seconds,
        "stopped": found.stopped,
        "exact": known.exact,
        "bound_db": known.db,
        "free_directions": known.free,
        "misfit": known.misfit,
    }


def _words(found: Search, known: Bound) -> str:
    words = f"exact to {floor(known.db)} dB" if known.exact else "not exact"
    return f"residual {found.residual:.1e}, {words}" + (", stopped by the time limit" if found.stopped else "")


def _groups(kept: Sequence[Search | None], left: Sequence[int], processes: int) -> list[list[int]]:
    """Victims that one process takes together.

    First come the searches that are left, in groups so small that each process gets two or more if there are enough.
    The searches that are kept follow one by one: only their bounds are computed.
    """
    if processes == 1:
        return [list(range(len(kept)))]
    size = min(CPU_TOGETHER, max(1, len(left) // (2 * processes)))
    groups = [list(left[first : first + size]) for first in range(0, len(left), size)]
    return groups + [[victim] for victim, search in enumerate(kept) if search is not None]


def _in_turn(
    victims: Sequence[int], points: Tensor, labels: Tensor, find: Find, kept: Sequence[Search | None]
) -> Iterator[tuple[int, Search]]:
    """These victims and their searches: first those that are kept, then the others as they end."""
    yield from ((victim, search) for victim in victims if (search := kept[victim]) is not None)
    missing = [victim for victim in victims if kept[victim] is None]
    if missing:
        yield from find(missing, points[missing], labels[missing])


def _read(victim: int, start: Tensor, files: SearchFiles | None) -> tuple[Search | None, str]:
    """A victim's kept search, if there is one, and a clause about its file."""
    if files is None:
        return None, ""
    try:
        search = files.read(victim, start)
        return search, "" if search is None else "; it had ended in an earlier run"
    except ValueError as error:
        return None, f"; searched anew, because its file '{files.path(victim).name}' is {error}"


def _write(victim: int, found: Search, files: SearchFiles | None) -> str:
    """Keep a search that has just been made; a clause that says why it could not be kept."""
    if files is None:
        return ""
    try:
        files.write(victim, found)
    except R2FError as error:
        return f"; not kept: {error}"
    return ""
