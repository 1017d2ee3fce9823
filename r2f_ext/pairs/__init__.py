"""(LoRA update, full gradient) pairs on proxy data."""

from r2f_ext.pairs.generate import GeneratedPairs, PairSource
from r2f_ext.pairs.shards import StoredPairs, write_pairs

__all__ = ["GeneratedPairs", "PairSource", "StoredPairs", "write_pairs"]
