"""Base models and the adapters bound to them."""

from r2f_ext.models.adapter import AdapterFiles, attach, read_adapter, untouched_a
from r2f_ext.models.base import load_base, save_base, shape_of

__all__ = ["AdapterFiles", "attach", "load_base", "read_adapter", "save_base", "shape_of", "untouched_a"]
