"""The closed forms' counts of one timm model, and the models of the table in docs/routes.md."""

from __future__ import annotations

from dataclasses import dataclass

from r2f_ext.errors import R2FError
from r2f_ext.inversion.geometry import base_geometry
from r2f_ext.inversion.identifiability import identifiability
from r2f_ext.inversion.route import Verdict
from r2f_ext.types import BaseModel

TIMM_MODELS = (
    "vit_tiny_patch16_224",
    "vit_small_patch32_224",
    "vit_small_patch16_224",
    "vit_base_patch32_224",
    "vit_base_patch16_224",
    "vit_base_patch16_384",
    "vit_base_patch8_224",
    "vit_large_patch16_224",
    "vit_large_patch14_224",
    "vit_huge_patch14_224",
    "vit_giant_patch14_224",
    "deit3_small_patch16_224",
    "vit_base_patch16_siglip_224",
    "vit_small_patch14_dinov2",
    "vit_base_patch14_reg4_dinov2",
    "vit_large_patch14_dinov2",
    "vit_giant_patch14_dinov2",
    "vit_base_patch32_clip_224",
    "vit_large_patch14_clip_224",
    "vit_huge_patch14_clip_224",
)
COLUMNS = ("model", "tokens", "width", "patch_position", "attention_rowspace", "LoRA rank")


@dataclass(frozen=True)
class ClosedForms:
    """The counts of one model's closed forms, batch 1.

    Attributes:
        tokens, width: N with prefix tokens, d; None where the model is no VisionTransformer.
        patch_position, attention_rowspace: verdicts on exact gradients.
        adapter_rank: the least LoRA rank on block 0's qkv from which A's movement (T >= 2 plain SGD steps) can give the
            image; None where no rank can.
    """

    tokens: int | None
    width: int | None
    patch_position: Verdict
    attention_rowspace: Verdict
    adapter_rank: int | None

    def cells(self) -> list[str]:
        """The row of the table after the model's name: unknowns ≤ equations, or unknowns > equations."""
        return [
            *("-" if value is None else str(value) for value in (self.tokens, self.width)),
            *(_cell(verdict) for verdict in (self.patch_position, self.attention_rowspace)),
            "-" if self.adapter_rank is None else str(self.adapter_rank),
        ]


def closed_forms(base: BaseModel) -> ClosedForms:
    """Count one model's closed forms."""
    verdicts = identifiability(base)
    position, rows = verdicts["patch_position"], verdicts["attention_rowspace"]
    try:
        geometry = base_geometry(base)
    except R2FError:
        return ClosedForms(None, None, position, rows, None)
    rank = geometry.patch_tokens if rows.identifiable else None
    return ClosedForms(geometry.tokens, geometry.width, position, rows, rank)


def _cell(verdict: Verdict) -> str:
    if verdict.equations == verdict.unknowns == 0:
        return "no"
    relation = "≤" if verdict.unknowns <= verdict.equations else ">"
    return f"{'yes' if verdict.identifiable else 'no'}: {verdict.unknowns} {relation} {verdict.equations}"
