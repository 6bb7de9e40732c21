"""The version of FreqKV."""

__version__ = "0.1.0"
