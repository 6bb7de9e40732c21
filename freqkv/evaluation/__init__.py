"""Measures of a causal language model through any cache: bits per byte, divergence from the full cache, and recall."""

from freqkv.evaluation.asking import RecallQuestion, Reply, ask, recall_accuracy
from freqkv.evaluation.intervals import Interval, paired_bootstrap, wilson_interval
from freqkv.evaluation.losses import Divergence, PositionBin, bits_per_byte, divergence, kl_to_reference, token_losses
from freqkv.evaluation.methods import (
    METHODS,
    Method,
    cache_bytes,
    freqkv_method,
    method,
    register,
    window_of_equal_bytes,
)
from freqkv.evaluation.records import Records, environment, text_digest
from freqkv.evaluation.tasks import TASKS, Haystack, Question, Sample
from freqkv.evaluation.text import byte_lengths
from freqkv.evaluation.wordings import CODE, PROSE, Wording

__all__ = [
    "CODE",
    "Divergence",
    "Haystack",
    "Interval",
    "METHODS",
    "Method",
    "PROSE",
    "PositionBin",
    "Question",
    "RecallQuestion",
    "Records",
    "Reply",
    "Sample",
    "TASKS",
    "Wording",
    "ask",
    "bits_per_byte",
    "byte_lengths",
    "cache_bytes",
    "divergence",
    "environment",
    "freqkv_method",
    "kl_to_reference",
    "method",
    "paired_bootstrap",
    "recall_accuracy",
    "register",
    "text_digest",
    "token_losses",
    "wilson_interval",
    "window_of_equal_bytes",
]
