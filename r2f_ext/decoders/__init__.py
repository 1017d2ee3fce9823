"""Decoders from LoRA space to full gradients, one per layer behind one interface."""

from r2f_ext.decoders.agnostic import ANY_A, ANY_A_KINDS, AgnosticPairs, ConcatenatedPairs, ProductPairs, shared_core
from r2f_ext.decoders.base import Decoder, Updates, stack_updates, with_saved
from r2f_ext.decoders.conv import Conv, UNet
from r2f_ext.decoders.evaluate import Accuracy, Guess, HeldOut, held_out_cosines, held_out_cosines_of_each
from r2f_ext.decoders.fit import fit_decoders
from r2f_ext.decoders.folder import decode_from_folder, fit_folder
from r2f_ext.decoders.kernel_ridge import KernelRidge
from r2f_ext.decoders.kinds import DEFAULT_KINDS, KINDS
from r2f_ext.decoders.mlp import MLP
from r2f_ext.decoders.projection import Projection
from r2f_ext.decoders.ridge import Ridge
from r2f_ext.decoders.row_lmmse import RowLMMSE
from r2f_ext.decoders.store import load_core, load_decoder, save_decoders

__all__ = [
    "ANY_A",
    "ANY_A_KINDS",
    "DEFAULT_KINDS",
    "KINDS",
    "MLP",
    "Accuracy",
    "AgnosticPairs",
    "ConcatenatedPairs",
    "Conv",
    "Decoder",
    "Guess",
    "HeldOut",
    "KernelRidge",
    "ProductPairs",
    "Projection",
    "Ridge",
    "RowLMMSE",
    "UNet",
    "Updates",
    "decode_from_folder",
    "fit_decoders",
    "fit_folder",
    "held_out_cosines",
    "held_out_cosines_of_each",
    "load_core",
    "load_decoder",
    "save_decoders",
    "shared_core",
    "stack_updates",
    "with_saved",
]
