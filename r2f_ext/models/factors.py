"""Checks the LoRA factors of an adapter without its base: shapes, ranks, numbers, and what is zero."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from r2f_ext.errors import R2FError, listed, plain
from r2f_ext.models.keys import PREFIX

# A number beyond this has diverged: its square, times a rank and a width, no longer fits float32.
LARGEST = 1e15
GATHER = "gather the parameters (DeepSpeed: zero.GatheredParameters, FSDP: a full state dict) and save it again"
ORTHOGONAL = 1e-2  # cosine below which rows count as orthogonal; bfloat16 alone leaves about 1e-3
MAX_GRAM = 1024  # rank up to which rows are compared
MIN_COSINES = 6  # fewest cosines to judge by; not all of so many are below ORTHOGONAL by chance


@dataclass(frozen=True)
class Factors:
    """Checked factors.

    Attributes:
        weights: canonical names -> A [r, d_in] (or [r, c, h, w]) and B [d_out, r] (or [d_out, r, 1, 1]), of the layers
            whose B is not zero.
        dropped: paths of the modules whose B is zero.
        notes: sentences for the report.
    """

    weights: dict[str, Tensor]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]


def check_factors(weights: dict[str, Tensor], saved: dict[str, Tensor], lora: dict[str, Any], where: str) -> Factors:
    """Check an adapter's factors against one another and against its configuration.

    Args:
        weights: factors under canonical names; saved: its other tensors, by name.
        lora: `AdapterConfig.lora`; where: the folder, for messages.

    Raises:
        R2FError: a tensor is empty, a slice or not finite, A and B do not belong together, the rank is not the
            configuration's, or every B is zero and there is nothing else in the file.
    """
    check_numbers({**weights, **saved}, where)
    pairs = factor_pairs(weights, where)
    check_ranks({path: a.shape[0] for path, (a, _) in pairs.items()}, lora, where)
    zero = {path: None for path, (_, b) in pairs.items() if not b.any()}  # a dict keeps the order
    if len(zero) == len(pairs) and not saved:
        raise R2FError(
            f"{where}: every B is zero, so it is unchanged by training as far as the factors show; audit an adapter "
            "saved after training."
        )
    notes = []
    if len(zero) == len(pairs):
        notes.append(
            f"B is zero in all {len(pairs)} adapted layers: the LoRA factors are untrained and left out, and only what "
            f"is saved whole beside them ({listed(sorted(saved), 4)}) is audited."
        )
    elif zero:
        notes.append(
            f"B is zero in {len(zero)} of {len(pairs)} adapted layers ({listed(list(zero))}): these hold no update and "
            "are left out of the audit."
        )
    kept = {path: pair for path, pair in pairs.items() if path not in zero}
    if _from_svd(kept):
        notes.append(
            "In every layer the rows of A are orthogonal and so are the columns of B, as an SVD of a difference of "
            "weights makes them: if they are one, A is not where training started, and what is said of A's start does "
            "not hold."
        )
    return Factors({key: weights[key] for path in kept for key in _keys(path)}, tuple(zero), tuple(notes))


def check_numbers(tensors: dict[str, Tensor], where: str) -> None:
    """Raise R2FError where a tensor is empty, or holds NaN, infinity or a number beyond `LARGEST`."""
    empty = [name for name, tensor in tensors.items() if tensor.numel() == 0]
    if empty:
        raise R2FError(
            f"{where} holds {len(empty)} empty tensors of {len(tensors)} ({listed(empty, 3)}), as DeepSpeed ZeRO-3 "
            f"leaves them where it saves without gathering: what they held is not known; {GATHER}."
        )
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        low, high = (float(extreme) for extreme in torch.aminmax(tensor))  # makes no copy of the tensor
        if not (isfinite(low) and isfinite(high)):
            bad = int((~torch.isfinite(tensor)).sum())
            raise R2FError(
                f"{where} holds NaN or infinity in {plain(name)} ({bad} of {tensor.numel()} numbers): it diverged or "
                "is damaged; save it again."
            )
        if max(-low, high) > LARGEST:
            raise R2FError(
                f"{where} holds numbers up to {max(-low, high):.0e} in {plain(name)}: its training diverged "
                "or the file is damaged; train it at a smaller learning rate."
            )


def factor_pairs(weights: dict[str, Tensor], where: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Path of a module -> (A, B), each pair of one rank.

    Raises:
        R2FError: a factor lacks its partner, has a shape or type that none has, or the ranks disagree.
    """
    paths = list(dict.fromkeys(key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in weights))
    pairs = {}
    for path in paths:
        key_a, key_b = _keys(path)
        if key_a not in weights or key_b not in weights:
            there, lacking = ("A", "B") if key_a in weights else ("B", "A")
            raise R2FError(
                f"{where} holds {there} of {plain(path)} but no {lacking}: the file is not whole; save it again."
            )
        pairs[path] = (weights[key_a], weights[key_b])
        for kind, factor in zip("AB", pairs[path], strict=True):
            _check_shape(f"{kind} of {plain(path)}", factor, where)
    ratios = {path: (a.shape[0], b.shape[1]) for path, (a, b) in pairs.items() if a.shape[0] != b.shape[1]}
    if ratios:
        _raise_rank_mismatch(ratios, len(pairs), where)
    _refuse_padded_slices(pairs, where)
    return pairs


def check_ranks(ranks: dict[str, int], lora: dict[str, Any], where: str) -> None:
    """Raise R2FError where a factor has a rank that the configuration does not give.

    A configuration's r may be larger than every factor (EVA spreads ranks), but not by far: PEFT makes layers of it.
    """
    given = {lora.get("r", 8), *lora.get("rank_pattern", {}).values()}
    for path, rank in ranks.items():
        if rank not in given:
            raise R2FError(
                f"{where}: A of {plain(path)} has {rank} rows, while adapter_config.json gives r = "
                f"{listed(sorted(map(str, given)))}: the two files are not of one save; copy both again."
            )
    if max(given) > 4 * max(ranks.values()):
        raise R2FError(
            f"{where}: adapter_config.json gives r = {max(given)}, while no factor has more than {max(ranks.values())} "
            "rows: the two files are not of one save; copy both again."
        )


def _keys(path: str) -> tuple[str, str]:
    return f"{PREFIX}{path}.lora_A.weight", f"{PREFIX}{path}.lora_B.weight"


def _check_shape(name: str, factor: Tensor, where: str) -> None:
    shape = list(factor.shape)
    if not factor.is_floating_point():
        raise R2FError(f"{where} stores {name} as {factor.dtype}: save it in float32, float16 or bfloat16.")
    if factor.ndim == 1:
        raise R2FError(f"{where} holds {name} as a flat list of {len(factor)} numbers, as a process's shard: {GATHER}.")
    if factor.ndim == 3:
        raise R2FError(
            f"{where} holds {name} with shape {shape}, as merged linear layers of loralib, an early PEFT or a Conv1d "
            "have it: train plain LoRA on linear layers."
        )
    if factor.ndim not in (2, 4):
        raise R2FError(f"{where} holds {name} with shape {shape}, which no factor has: save it again with PEFT.")


def _raise_rank_mismatch(ratios: dict[str, tuple[int, int]], layers: int, where: str) -> None:
    path, (rows, columns) = next(iter(ratios.items()))
    said = f"A of {plain(path)} has {rows} rows and B {columns} columns"
    parts = {columns // rows if columns % rows == 0 else 0 for rows, columns in ratios.values()}
    if len(ratios) == layers and len(parts) == 1 and min(parts) > 1:
        raise R2FError(
            f"{where} holds a slice: {said}, and so in every layer, as one of {min(parts)} processes holds it: "
            f"{GATHER}."
        )
    raise R2FError(f"{where} holds factors that do not belong together: {said}; save it again.")


def _refuse_padded_slices(pairs: dict[str, tuple[Tensor, Tensor]], where: str) -> None:
    """No training leaves whole rows of A and the same share of B's rows at exactly zero in every layer."""
    shares: set[float] = set()
    for a, b in pairs.values():
        rows = [factor.flatten(1).any(1) for factor in (a, b)]
        shares.update(float(row.double().mean()) for row in rows)
    if len(shares) == 1 and 0 < (share := shares.pop()) < 1:
        raise R2FError(
            f"{where} holds a slice: in every layer only {share:.0%} of the rows of A and of B are not zero, as where "
            f"the rows of other processes were not gathered: {GATHER}."
        )


def _from_svd(pairs: dict[str, tuple[Tensor, Tensor]]) -> bool:
    ranks = [a.shape[0] for a, _ in pairs.values()]
    if sum(rank * (rank - 1) // 2 for rank in ranks) < MIN_COSINES or max(ranks) > MAX_GRAM:
        return False
    return all(_orthogonal(a.flatten(1)) and _orthogonal(b.flatten(1).T) for a, b in pairs.values())


def _orthogonal(rows: Tensor) -> bool:
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    cosines = unit @ unit.T
    return bool((cosines - torch.diag(cosines.diagonal())).abs().max() < ORTHOGONAL)
