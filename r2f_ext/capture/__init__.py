"""Per-group layer inputs and output gradients: full gradients as factors."""

from r2f_ext.capture.hooks import Capture

__all__ = ["Capture"]
