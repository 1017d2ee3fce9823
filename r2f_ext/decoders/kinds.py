"""Decoder classes by kind."""

from __future__ import annotations

from r2f_ext.decoders.base import Decoder
from r2f_ext.decoders.conv import Conv, UNet
from r2f_ext.decoders.kernel_ridge import KernelRidge
from r2f_ext.decoders.mlp import MLP
from r2f_ext.decoders.projection import Projection
from r2f_ext.decoders.ridge import Ridge
from r2f_ext.decoders.row_lmmse import RowLMMSE

KINDS: dict[str, type[Decoder]] = {
    kind.kind: kind for kind in (Projection, RowLMMSE, Ridge, KernelRidge, MLP, Conv, UNet)
}
DEFAULT_KINDS = ("projection", "row_lmmse", "ridge")  # closed form, seconds to fit
