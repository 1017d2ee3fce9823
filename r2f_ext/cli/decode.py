"""`r2f decode`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.markup import escape

from r2f_ext.cli.display import console, table
from r2f_ext.cli.inputs import Options, read_adapter
from r2f_ext.decoders import AgnosticPairs, load_core, load_decoder, stack_updates, with_saved
from r2f_ext.errors import R2FError
from r2f_ext.files import output_folder, write_tensors
from r2f_ext.pairs import StoredPairs


def run_decode(options: Options) -> dict[str, Any]:
    loaded = read_adapter(options)
    target, adapters = loaded.target, loaded.updates
    folder, decoders = output_folder(options.out), Path(options.decoders)
    pairs, updates = StoredPairs(options.pairs, target.base), stack_updates(adapters)
    if pairs.per_victim_a:
        if pairs.target.layers != target.layers:
            raise R2FError(f"the pairs in '{options.pairs}' are of other layers, rank or alpha: make new ones.")
        projected = AgnosticPairs(pairs, load_core(decoders, pairs))
        updates = projected.view(updates, adapters[0].start)
        decoder = load_decoder(decoders, options.kind, pairs, projected)
    else:
        pairs.check_same_a(adapters[0])
        decoder = load_decoder(decoders, options.kind, pairs)
    decoded = with_saved(target, stack_updates(adapters), decoder.decode(updates))
    path = folder / "gradients.safetensors"
    write_tensors(path, decoded.dense, {"kind": options.kind, "unit": "gradient times the victim's learning rate"})
    norms = {name: float(gradient.norm()) for name, gradient in decoded.dense.items()}
    table("Decoded gradients", ["layer", "norm"], [[name, f"{norm:.3e}"] for name, norm in norms.items()])
    console.print(f"gradients: {escape(str(path))}")
    return {"kind": options.kind, "norms": norms, "file": path.name}
