"""Base models and the adapters bound to them."""

from r2f_ext.models.adapter_files import read_adapter
from r2f_ext.models.attach import attach, load_adapter, note_on_base
from r2f_ext.models.base import load_base, shape_of
from r2f_ext.models.draws import forgot_start
from r2f_ext.models.evidence import Evidence, evidence_of
from r2f_ext.models.facts import AdapterFacts
from r2f_ext.models.initial import (
    InitialA,
    InitialFactors,
    common_a,
    differing_layer,
    initial_from_folder,
    initial_from_seed,
)
from r2f_ext.models.saved_modules import compare_saved, with_saved_facts
from r2f_ext.models.timm_base import save_base

__all__ = [
    "AdapterFacts",
    "Evidence",
    "InitialA",
    "InitialFactors",
    "attach",
    "common_a",
    "compare_saved",
    "differing_layer",
    "evidence_of",
    "forgot_start",
    "initial_from_folder",
    "initial_from_seed",
    "load_adapter",
    "load_base",
    "note_on_base",
    "read_adapter",
    "save_base",
    "shape_of",
    "with_saved_facts",
]
