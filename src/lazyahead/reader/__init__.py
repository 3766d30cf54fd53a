"""The built-in reader: a small model that answers questions about documents of its own little
world.

`reader_path()` is a folder any tool that knows Hugging Face models can load; `samples()` draws
documents with questions and answers from the world the reader was trained on; `score()` measures an
answer as LongBench measures its category.
"""

from pathlib import Path

from lazyahead.reader.metrics import score
from lazyahead.reader.prompt import format_prompt, user_message
from lazyahead.reader.tasks import CATEGORIES, WORKLOADS, Sample, samples


def reader_path() -> Path:
    """Folder with the built-in model: config.json, model.safetensors and the tokenizer's files."""
    return Path(__file__).parent / "weights"


__all__ = [
    "CATEGORIES",
    "WORKLOADS",
    "Sample",
    "format_prompt",
    "reader_path",
    "samples",
    "score",
    "user_message",
]
