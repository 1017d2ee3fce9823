"""(LoRA update, full gradient) pairs: generated in batches, simulated over many steps, streamed, stored in shards."""

from r2f_ext.pairs.generate import GeneratedPairs, PairSource
from r2f_ext.pairs.shards import ReprojectedPairs, StoredPairs, WritablePairs, write_pairs
from r2f_ext.pairs.simulation import SimulatedPairs, Training, Victims, simulate

__all__ = [
    "GeneratedPairs",
    "PairSource",
    "ReprojectedPairs",
    "SimulatedPairs",
    "StoredPairs",
    "Training",
    "Victims",
    "WritablePairs",
    "simulate",
    "write_pairs",
]
