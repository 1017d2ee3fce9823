"""One search after another: V victims from one start, with a line on each as it ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import floor

import torch
from torch import Tensor

from r2f_ext.errors import R2FError
from r2f_ext.inversion.exactness import Bound
from r2f_ext.inversion.kept import SearchFiles
from r2f_ext.inversion.newton import Search
from r2f_ext.progress import Advance
from r2f_ext.types import Reconstruction


def search_each(
    route: str,
    start: Reconstruction,
    find: Callable[[int, Tensor, Tensor], Search],
    bound: Callable[[int, Tensor, Tensor], Bound],
    advance: Advance,
    doubt: str | None = None,
    files: SearchFiles | None = None,
) -> Reconstruction:
    """Run one search per victim; its image replaces the start if its residual is small or far below the start's.

    Args:
        start: images [V, c, h, w] in [0, 1] and labels [V] that the searches begin from.
        find: (victim, start point [c * h * w], label [1]) -> Search.
        bound: (victim, image found [c * h * w], label [1]) -> what the update says of it; for images that replace the
            start, unless there is a doubt.
        advance: called with 1 and a line after each victim.
        doubt: why none can be called exact, as a clause.
        files: where each search is kept once it has ended, and taken from if it is there; None: nowhere.

    Returns:
        `per_victim` holds `residual`, `start_residual`, `passes`, `stopped` and `exact` (1 or 0), `bound_db`,
        `free_directions` and `misfit` (see `Bound`; NaN where not computed); `details` how many are exact.

    Raises:
        R2FError: the start has no labels.
    """
    began = time.perf_counter()
    if start.labels is None:
        raise R2FError(f"{route} needs labels: start it from a route that finds them.")
    if files is not None and (strangers := files.strangers()):
        which, verb = ("search", "is") if strangers == 1 else ("searches", "are")
        others = f"{strangers} kept {which} {verb} of other adapters, images, settings or versions"
        advance(0, f"{others} and {verb} not used")
    images, figures = [], []
    for victim, (image, label) in enumerate(zip(start.images, start.labels, strict=True)):
        found, remark = _found(victim, image.flatten(), label[None], find, files)
        judged = found.improved and doubt is None
        known = bound(victim, found.image, label[None]) if judged else Bound()
        figures.append(
            {
                "residual": found.residual,
                "start_residual": found.start_residual,
                "passes": found.passes,
                "stopped": found.stopped,
                "exact": known.exact,
                "bound_db": known.db,
                "free_directions": known.free,
                "misfit": known.misfit,
            }
        )
        images.append(found.image.view_as(image) if found.improved else image)
        words = f"exact to {floor(known.db)} dB" if known.exact else "not exact"
        words += ", stopped by the time limit" if found.stopped else ""
        so_far = sum(bool(each["exact"]) for each in figures)
        line = (
            f"search {victim + 1} of {len(start.images)}: residual {found.residual:.1e}, {words}; {so_far} exact so far"
        )
        advance(1, line + remark)
    per_victim = {key: torch.tensor([float(each[key]) for each in figures], dtype=torch.float64) for key in figures[0]}
    exact = int(per_victim["exact"].sum())
    why = f"Gauss-Newton on the update itself: {exact} of {len(images)} images are exact"
    if doubt is not None:
        why += f", because {doubt}"
    if stopped := int(per_victim["stopped"].sum()):
        why += f"; the time limit stopped {stopped} of {len(images)} searches"
    seconds, details = time.perf_counter() - began, {"exact": float(exact)}
    return Reconstruction(
        route, torch.stack(images), start.labels, why, seconds, details, per_victim=per_victim, doubt=doubt
    )


def _found(
    victim: int,
    start: Tensor,
    label: Tensor,
    find: Callable[[int, Tensor, Tensor], Search],
    files: SearchFiles | None,
) -> tuple[Search, str]:
    """A victim's search, from its file or made now and kept, and a clause that says which where there are files."""
    if files is None:
        return find(victim, start, label), ""
    remark = ""
    try:
        kept = files.read(victim, start)
        if kept is not None:
            return kept, "; it had ended in an earlier run"
    except ValueError as error:
        remark = f"; searched anew, because its file '{files.path(victim).name}' is {error}"
    found = find(victim, start, label)
    try:
        files.write(victim, found)
    except R2FError as error:
        remark += f"; not kept: {error}"
    return found, remark
