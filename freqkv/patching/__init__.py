"""Patching a model: its forwards are replaced by ones that know FreqKV."""
