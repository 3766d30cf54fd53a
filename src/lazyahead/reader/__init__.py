"""The built-in reader: a small model that answers questions about documents of its own little world."""

from pathlib import Path


def reader_path() -> Path:
    """Folder with the built-in model: config.json, model.safetensors and the tokenizer's files."""
    return Path(__file__).parent / "weights"


__all__ = ["reader_path"]
