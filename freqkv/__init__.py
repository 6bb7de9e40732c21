"""FreqKV: a KV cache that lets RoPE language models in Transformers run forever inside their own context window."""

from freqkv.analysis import Support, supported
from freqkv.attention import Patch, patch, unpatch
from freqkv.cache import FreqKVCache, UnsupportedModelError
from freqkv.compressors import Compressor, keep_recent, low_pass_entries, mean_pool
from freqkv.config import FreqKVConfig
from freqkv.schedule import Fold, Schedule, Segment
from freqkv.serialization import CacheFileError
from freqkv.transform import dct, idct, low_pass

__version__ = "0.1.0"

__all__ = [
    "CacheFileError",
    "Compressor",
    "Fold",
    "FreqKVCache",
    "FreqKVConfig",
    "Patch",
    "Schedule",
    "Segment",
    "Support",
    "UnsupportedModelError",
    "dct",
    "idct",
    "keep_recent",
    "low_pass",
    "low_pass_entries",
    "mean_pool",
    "patch",
    "supported",
    "unpatch",
]
