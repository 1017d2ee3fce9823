"""The settings of an audit. Every field is written to report.json, so that the report can be replayed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from r2f_ext.errors import R2FError
from r2f_ext.inversion.matching import MatchingConfig
from r2f_ext.inversion.task import GaussNewtonConfig


@dataclass(frozen=True)
class AuditConfig:
    """Sizes and seeds of one audit.

    Attributes:
        pairs: proxy pairs to ask for, for the amortised route; a smaller proxy gives fewer.
        decoder_pairs: how many of them the decoders are fitted to.
        held_out: further pairs that decoders are scored on.
        matching: gradient matching from the decoded gradient.
        refinement: LoRA-space matching from the amortised estimate.
        routes: names of routes to run, with those that they start from; None: the default ones.
        gauss_newton: also search for the exact images; a few minutes an adapter of the embedded model on 2 cores.
        start_images: most images of one label that make pairs for an estimate that the search may start from; None: as
            many as fit into memory.
        search: settings of the Gauss-Newton search, among them the limit of its time. Its seed is replaced by `seed`,
            because a command line, which repeats the audit, has one seed.
        precision: of the model when pairs are made, "float32", "tf32" or "bfloat16" (see GeneratedPairs).
        seed: of proxies, random labels, the shuffled control and the search.
    """

    pairs: int = 8000
    decoder_pairs: int = 6000
    held_out: int = 100
    matching: MatchingConfig = field(default_factory=MatchingConfig)
    refinement: MatchingConfig = field(
        default_factory=lambda: MatchingConfig(steps=150, step_size=0.005, tv_weight=0.3)
    )
    routes: tuple[str, ...] | None = None
    gauss_newton: bool = False
    start_images: int | None = None
    search: GaussNewtonConfig = field(default_factory=GaussNewtonConfig)
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "search", replace(self.search, seed=self.seed))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> AuditConfig:
        """The config that report.json holds under "config".

        Raises:
            R2FError: fields that this version does not have.
        """
        try:
            parts = {
                "matching": MatchingConfig(**data["matching"]),
                "refinement": MatchingConfig(**data["refinement"]),
                "search": GaussNewtonConfig(**_with_tuples(data["search"])),
            }
            return cls(**{**_with_tuples(data), **parts})
        except (KeyError, TypeError) as error:
            raise R2FError(f"the config is not one that this version writes ({error}): audit anew.") from error


def _with_tuples(data: dict[str, Any]) -> dict[str, Any]:
    """JSON has no tuples: lists stand for them."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
