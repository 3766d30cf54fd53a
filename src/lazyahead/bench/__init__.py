"""Measurements: ours beside plain transformers, in the same process, on the same model."""
