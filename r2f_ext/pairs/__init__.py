"""(LoRA update, full gradient) pairs: generated in batches, simulated over many steps, streamed, stored in shards."""

from r2f_ext.pairs.choice import pairs_from_images
from r2f_ext.pairs.generate import GeneratedPairs, PairSource, updates_of
from r2f_ext.pairs.shards import PairsPlan, WritablePairs, plan_pairs, write_pairs
from r2f_ext.pairs.simulation import SimulatedPairs, Training, Victims, simulate
from r2f_ext.pairs.starts import random_a
from r2f_ext.pairs.stored import ReprojectedPairs, StoredPairs

__all__ = [
    "GeneratedPairs",
    "PairSource",
    "PairsPlan",
    "ReprojectedPairs",
    "SimulatedPairs",
    "StoredPairs",
    "Training",
    "Victims",
    "WritablePairs",
    "pairs_from_images",
    "plan_pairs",
    "random_a",
    "simulate",
    "updates_of",
    "write_pairs",
]
