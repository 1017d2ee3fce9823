"""What an adapter folder says beside its factors; every report shows it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterFacts:
    """Facts of one adapter folder, each a complete sentence that was checked against the files.

    Attributes:
        name: the folder's last part.
        notes: sentences that qualify the figures (keys that were renamed, layers that were dropped, ...).
        leaks: sentences on what the folder gives away outside of the LoRA factors.
        dropout: lora_dropout of the configuration; above 0 no route can be exact.
        init: init_lora_weights of the configuration, as text: "true", "gaussian" or "eva".
        base_name: base_model_name_or_path of the configuration, a text to be shown and compared, never opened.
        dropped: paths of adapted modules whose B is zero; their factors are not in the audit.
    """

    name: str
    notes: tuple[str, ...] = ()
    leaks: tuple[str, ...] = ()
    dropout: float = 0.0
    init: str = "true"
    base_name: str | None = None
    dropped: tuple[str, ...] = ()
