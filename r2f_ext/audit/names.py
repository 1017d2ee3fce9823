"""Words that pictures, page and terminal share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from r2f_ext.inversion.routes import registry
from r2f_ext.types import AdaptedLayer

CONTROLS = {
    "mean_image": "mean image",
    "class_mean": "class mean",
    "nearest_proxy": "nearest proxy",
    "shuffled_adapter": "other adapter",
    "noise_adapter": "noise adapter",
    "same_label_stranger": "stranger of the same label",
}


def row_name(key: str) -> str:
    """The title of a route, `control: ...` of a control, and any other key as it is."""
    if key in CONTROLS:
        return f"control: {CONTROLS[key]}"
    return _titles().get(key, key)


@cache
def _titles() -> dict[str, str]:
    return {name: route.title or name for name, route in registry().items()}


def span(name: str, values: Sequence[float]) -> str:
    """`rank 8` where all values agree, else `ranks 8-16`."""
    low, high = min(values), max(values)
    return f"{name} {low:g}" if low == high else f"{name}s {low:g}-{high:g}"


def layers_in_words(layers: Sequence[AdaptedLayer]) -> str:
    """`16 adapted layers, ranks 8-16, scale 2, 1 layer saved whole`."""
    adapted = [layer for layer in layers if not layer.saved]
    words = [counted(len(adapted), "adapted layer")] if adapted else []
    if adapted:
        words += [span("rank", [layer.rank for layer in adapted]), span("scale", [layer.scale for layer in adapted])]
    if len(adapted) < len(layers):
        words.append(f"{counted(len(layers) - len(adapted), 'layer')} saved whole")
    return ", ".join(words)


def counted(count: int, name: str) -> str:
    """`1 adapter`, `2 adapters`."""
    return f"{count:,} {name}{'' if count == 1 else 's'}"
