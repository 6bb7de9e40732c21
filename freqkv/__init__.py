"""FreqKV: a KV cache that lets RoPE language models in Transformers run forever inside their own context window."""

from freqkv.cache import FreqKVCache
from freqkv.compressors import Compressor, Span, keep_recent, low_pass_entries, mean_pool
from freqkv.config import FreqKVConfig
from freqkv.errors import CacheFileError, UnsupportedModelError
from freqkv.models.support import Support, supported
from freqkv.patching.handle import Patch, patch, unpatch
from freqkv.presets import PRESETS, Preset
from freqkv.recommendation import Recommendation, recommend
from freqkv.schedule import Fold, FreqKVSchedule, Schedule
from freqkv.selection import KeepAttended, KeepNovel, keep_attended, keep_novel
from freqkv.settings import Settings
from freqkv.transform import dct, idct, low_pass
from freqkv.version import __version__

__all__ = [
    "CacheFileError",
    "Compressor",
    "Fold",
    "FreqKVCache",
    "FreqKVConfig",
    "FreqKVSchedule",
    "KeepAttended",
    "KeepNovel",
    "PRESETS",
    "Patch",
    "Preset",
    "Recommendation",
    "Schedule",
    "Settings",
    "Span",
    "Support",
    "UnsupportedModelError",
    "__version__",
    "dct",
    "idct",
    "keep_attended",
    "keep_novel",
    "keep_recent",
    "low_pass",
    "low_pass_entries",
    "mean_pool",
    "patch",
    "recommend",
    "supported",
    "unpatch",
]
