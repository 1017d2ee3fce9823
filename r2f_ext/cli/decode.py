"""`r2f decode`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.markup import escape

from r2f_ext.cli.display import console, table
from r2f_ext.cli.inputs import Options, read_adapter
from r2f_ext.decoders import decode_from_folder
from r2f_ext.files import output_folder, write_tensors
from r2f_ext.pairs import StoredPairs


def run_decode(options: Options) -> dict[str, Any]:
    loaded = read_adapter(options)
    folder, pairs = output_folder(options.out), StoredPairs(options.pairs, loaded.target.base)
    decoded = decode_from_folder(Path(options.decoders), options.kind, pairs, loaded.target, loaded.updates)
    path = folder / "gradients.safetensors"
    write_tensors(path, decoded.dense, {"kind": options.kind, "unit": "gradient times the victim's learning rate"})
    norms = {name: float(gradient.norm()) for name, gradient in decoded.dense.items()}
    table("Decoded gradients", ["layer", "norm"], [[name, f"{norm:.3e}"] for name, norm in norms.items()])
    console.print(f"gradients: {escape(str(path))}")
    return {"kind": options.kind, "norms": norms, "file": path.name}
