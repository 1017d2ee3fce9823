"""What the factors themselves show of the training: where it started, how many steps it took, and what stays unknown.

After one step of any optimiser from PEFT's start A still is A_0, because grad_A = 0 while B = 0 (docs/methods.md,
section 1). Later steps move A, and weight decay shrinks it. From a B_0 that is not 0, one step of plain SGD gives
B_1 - B_0 = -lr s G A_0^T and A_1 - A_0 = -lr s B_0^T G, hence B_0^T (B_1 - B_0) = (A_1 - A_0) A_0^T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from r2f_ext.models.draws import Trace, eva_trace, forgot_start, gaussian_trace, in_uniform_range, uniform_trace
from r2f_ext.models.facts import AdapterFacts
from r2f_ext.models.storage import storage_dtype
from r2f_ext.types import LoraUpdate

KNOWN = "known"
NEARLY = 0.01  # entries of |B| within this share of the layer's maximum count as equal to it
SIGNS_FROM = 0.1  # share of such entries from which B holds signs: plain SGD leaves less than 0.001, AdamW above 0.9
FEWEST = 64  # entries of B that are not 0; fewer show nothing
ZEROS = 0.01  # share of zeros in A that no draw and no step of training leaves
ROUNDINGS = 1.0  # of the factors, in units of the storage precision; one step leaves up to 0.1 of it

NO_BATCH = "The factors do not show how many images a step saw; every figure assumes one."
NO_RECIPE = "how many, with which optimiser and which rates, the factors do not show."
UNCHANGED = (
    "Every B equals its start: the adapter is unchanged, so its factors hold nothing to recover, which does not show "
    "that an adapter trained on the same data is safe."
)
UNTRAINED = (
    "Every B is zero, so the LoRA factors are untrained, and what moved is among the modules that the file holds "
    "whole; over how many steps, with which optimiser and on how many images a step, the file does not show: every "
    "figure assumes one step of plain SGD on one image."
)
START_MOVES_A = (
    "As B did not start at 0, A's movement shows B_0^T G too: the file gives away more than a plain adapter."
)
SHOWN = {
    ("default", Trace.NONE): "A is to the last bit what PEFT draws at the start, as after one step or with A frozen.",
    ("default", Trace.POSSIBLE): (
        "A lies in PEFT's initial range, as after one step; a movement too small to leave it cannot be excluded."
    ),
    ("gaussian", Trace.NONE): (
        "A still has the pattern of torch's normal generator, which draws PEFT's gaussian start, as after one step or "
        "with A frozen."
    ),
    ("gaussian", Trace.POSSIBLE): (
        "A has the spread of PEFT's gaussian start, which has no edge, so that one step and several look alike; name "
        "the start with --initial FOLDER or --a0-seed N to tell them apart."
    ),
    ("gaussian", Trace.MOVED): (
        "A does not have the spread of PEFT's gaussian start: more than one step was taken, or A was not drawn so; "
        f"{NO_RECIPE}"
    ),
    ("eva", Trace.POSSIBLE): (
        "The rows of A are orthogonal, as EVA makes them and as after one step; a small movement cannot be excluded."
    ),
    ("eva", Trace.MOVED): (
        "The rows of A are not orthogonal, and EVA makes them so: more than one step was taken, or EVA did not make A; "
        f"{NO_RECIPE}"
    ),
    (KNOWN, Trace.NONE): (
        "A equals its known start up to rounding and weight decay, as after one step or with A frozen."
    ),
    (KNOWN, Trace.MOVED): f"A has moved from its known start, so more than one step was taken; {NO_RECIPE}",
}
CONVERTED = "The file holds its own start, as PEFT converts PiSSA, OLoRA, CorDA and LoRA-GA, and A and B have moved"
SHOWN_CONVERTED = {
    Trace.NONE: f"{CONVERTED} from it as in one step of plain SGD, up to rounding.",
    Trace.MOVED: (
        f"{CONVERTED} otherwise than in one step of plain SGD: in more steps, by another optimiser or in lower "
        "precision."
    ),
}


@dataclass(frozen=True)
class Evidence:
    """What the factors of V adapters of one start show of its recipe.

    Attributes:
        steps: 1 where every A is its start as far as the factors show; None where more steps cannot be excluded.
        start: "known" where A before training is, from the file or the user; else how A was drawn: "default",
            "gaussian" or "eva".
        signs_only: much of |B| is constant in some adapter, as after the first step of Adam(W): it holds signs.
        sentences: what is known and what is not, for the report.
    """

    steps: int | None
    start: str
    signs_only: bool
    sentences: tuple[str, ...]


def evidence_of(updates: Sequence[LoraUpdate], facts: Sequence[AdapterFacts] = ()) -> Evidence:
    """The evidence in the factors of V adapters that share one start.

    Args:
        updates: their factors; with `a0` where the start is known, from the file or from the user. Adapters whose every
            B is zero, but which carry trained modules, have no factors.
        facts: what their folders say, one per adapter; empty: PEFT's default start.
    """
    start = _start_of(updates, facts)
    if not any(one.b for one in updates):
        return Evidence(None, start, False, (UNTRAINED,))
    if not any(b.any() for one in updates for b in one.b.values()):
        return Evidence(None, start, False, (UNCHANGED,))
    trace, said = _judged(updates, start)
    sentences = [said]
    if any(one.b0 for one in updates):
        sentences.append(START_MOVES_A)
    signs = _signs(updates)
    sentences += [*signs, *_zeros_in_a(updates)]
    one_step = trace is Trace.NONE or (trace is Trace.POSSIBLE and start != "gaussian")
    return Evidence(1 if one_step else None, start, bool(signs), (*sentences, NO_BATCH))


def start_notes(updates: Sequence[LoraUpdate], steps: int | None) -> tuple[str, ...]:
    """A sentence on what replaces an unknown A before training; none if it is known, or one step left A unchanged."""
    factors = any(one.without_saved().a for one in updates)  # there are none if only a saved head was trained
    if steps == 1 or not factors or all(one.a0 is not None for one in updates):
        return ()
    which = "their mean A stands" if len(updates) > 1 else "its final A stands"
    return (f"A before training is not known: {which} in for it, in the proxies too.",)


def _start_of(updates: Sequence[LoraUpdate], facts: Sequence[AdapterFacts]) -> str:
    if all(one.a0 is not None for one in updates):
        return KNOWN
    return facts[0].init if facts and facts[0].init in ("gaussian", "eva") else "default"


def _judged(updates: Sequence[LoraUpdate], start: str) -> tuple[Trace, str]:
    """The trace of a movement that A shows, and a sentence that states it."""
    if start == KNOWN:
        converted = any(one.b0 for one in updates)
        still = all(moved_as_one_plain_step(one) if one.b0 else _is_start(one) for one in updates)
        trace = Trace.NONE if still else Trace.MOVED
        return trace, (SHOWN_CONVERTED[trace] if converted else SHOWN[start, trace])
    factors = [kept for one in updates for a in one.a.values() if len(kept := _without_zero_rows(a))]
    traces = {"default": uniform_trace, "gaussian": gaussian_trace, "eva": eva_trace}
    trace = traces[start](factors) if factors else Trace.POSSIBLE
    if (start, trace) == ("default", Trace.MOVED):
        return trace, _left_default(factors)
    return trace, SHOWN[start, trace]


def _without_zero_rows(a: Tensor) -> Tensor:
    return a[a.any(1)]


def _left_default(factors: Sequence[Tensor]) -> str:
    """How A of several layers differs from PEFT's default start."""
    forgot = sum(forgot_start(a) for a in factors)
    if forgot:
        return (
            f"In {forgot} of {len(factors)} layers A lacks the small singular values of a random start, as weight "
            f"decay removes them in many steps, or A was not drawn at random; {NO_RECIPE}"
        )
    left = sum(not in_uniform_range(a) for a in factors)
    return (
        f"A has left PEFT's initial range in {left} of {len(factors)} layers: more than one step was taken, or A was "
        f"not drawn by PEFT's default start; {NO_RECIPE}"
    )


def _is_start(update: LoraUpdate) -> bool:
    """Whether every entry of every A is that of A_0, times one c <= 1 a layer, up to storage rounding."""
    assert update.a0 is not None
    for name, a in update.a.items():
        after, start = a.double(), update.a0[name].to(a).double()
        share = float((after * start).sum() / start.square().sum().clamp_min(1e-300))
        stored = torch.finfo(storage_dtype([a]))
        rounding = stored.eps * after.abs().clamp_min(stored.smallest_normal)
        if share > 1 + stored.eps or ((after - min(share, 1.0) * start).abs() > rounding).any():
            return False
    return True


def moved_as_one_plain_step(update: LoraUpdate) -> bool:
    """Whether A and B moved from (A_0, B_0) as in one step of plain SGD: B_0^T dB = dA A_0^T in every layer.

    Up to the rounding of the stored factors.
    """
    assert update.a0 is not None and update.b0 is not None
    eps = torch.finfo(update.stored).eps
    for name, a0 in update.a0.items():
        a0, a, b0, moved_b = (t.double() for t in (a0, update.a[name], update.b0[name], update.b[name]))
        gap = b0.mT @ moved_b - (a - a0) @ a0.mT
        rounding = a.norm() * torch.linalg.matrix_norm(a0, 2) + (b0 + moved_b).norm() * torch.linalg.matrix_norm(b0, 2)
        if gap.norm() > ROUNDINGS * eps * rounding:
            return False
    return True


def constant_share(b: dict[str, Tensor]) -> float:
    """Share of the entries of |B| [d_out, r] within 1 % of their layer's largest, which is not counted; 0 for few
    entries.

    AdamW's first step is -lr g / (|g| + eps): lr in size wherever |g| is far above eps, 1e-8.
    """
    nearly = present = 0
    for factor in b.values():
        sizes = factor[factor != 0].abs()
        if len(sizes):
            present += len(sizes)
            nearly += int((sizes >= (1 - NEARLY) * sizes.max()).sum()) - 1
    return nearly / present if present >= FEWEST else 0.0


def _signs(updates: Sequence[LoraUpdate]) -> list[str]:
    """A sentence on adapters whose B holds signs, if there are any."""
    shares = [share for one in updates if (share := constant_share(one.b)) >= SIGNS_FROM]
    if not shares:
        return []
    least = int(100 * min(shares))
    return [
        f"In {len(shares)} of {len(updates)} adapters {least} % or more of the entries of |B| equal the largest of "
        "their layer to 1 %, as after the first step of Adam or AdamW: of these, B shows the gradient's signs. "
        "After a single step in float32 it also shows the sizes of small entries, which gauss_newton_unrolled reads if "
        "the recipe is known."
    ]


def _zeros_in_a(updates: Sequence[LoraUpdate]) -> list[str]:
    """A sentence on zeros in A, if there are too many for a draw."""
    shares = {name: float((a == 0).double().mean()) for one in updates for name, a in one.a.items()}
    holed = sorted(name for name, share in shares.items() if share > ZEROS)
    if not holed:
        return []
    first, part = holed[0], 100 * shares[holed[0]]
    return [
        f"In {len(holed)} of {len(shares)} layers entries of A are exactly 0 ({part:.0f} % of {first}), which no draw "
        "of PEFT and no step of training leaves: they were cut off, masked or never written."
    ]
