"""r2f-ext: how much of its training data does a LoRA adapter give away?

The pipeline, left to right: capture -> pairs -> decoders -> inversion -> audit.

The names below are all that most programs need. Each is imported when it is first used, so that `import r2f_ext`
loads neither torch nor anything else that is heavy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from r2f_ext.audit import audit
    from r2f_ext.config import AuditConfig
    from r2f_ext.data import load_images
    from r2f_ext.decoders import fit_decoders
    from r2f_ext.errors import R2FError
    from r2f_ext.inversion.identifiability import identifiability
    from r2f_ext.models import load_adapter, load_base
    from r2f_ext.pairs import GeneratedPairs
    from r2f_ext.types import Reconstruction

__version__ = "0.1.0"

__all__ = [
    "AuditConfig",
    "GeneratedPairs",
    "R2FError",
    "Reconstruction",
    "__version__",
    "audit",
    "fit_decoders",
    "identifiability",
    "load_adapter",
    "load_base",
    "load_images",
]

# Public name -> (module, name in it). `audit` is not here: importing the subpackage `r2f_ext.audit` binds that name,
# and the subpackage can be called (see its last lines).
_NAMES = {
    "AuditConfig": ("config", "AuditConfig"),
    "GeneratedPairs": ("pairs", "GeneratedPairs"),
    "R2FError": ("errors", "R2FError"),
    "Reconstruction": ("types", "Reconstruction"),
    "fit_decoders": ("decoders", "fit_decoders"),
    "identifiability": ("inversion.identifiability", "identifiability"),
    "load_adapter": ("models", "load_adapter"),
    "load_base": ("models", "load_base"),
    "load_images": ("data", "load_images"),
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562); later uses find it in the module."""
    if name == "audit":
        return import_module("r2f_ext.audit")
    if name not in _NAMES:
        raise AttributeError(f"module 'r2f_ext' has no attribute {name!r}")
    module, attribute = _NAMES[name]
    value = getattr(import_module(f"r2f_ext.{module}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
