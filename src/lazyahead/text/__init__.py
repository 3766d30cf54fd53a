"""Between text and tokens: prompts in, answers out. Knows neither torch nor models."""

from __future__ import annotations

from pathlib import Path

from lazyahead.errors import RequestError
from lazyahead.text.detokenizer import CONTEXT, Detokenizer, StopStrings, Tokenizer
from lazyahead.text.messages import Message
from lazyahead.text.prompt import Prompt, encode_prompt, encode_turn

__all__ = [
    "CONTEXT",
    "Detokenizer",
    "Message",
    "Prompt",
    "StopStrings",
    "Tokenizer",
    "encode_prompt",
    "encode_turn",
    "read_text",
]

MAX_FILE_BYTES = 64 << 20


def read_text(path: str | Path) -> str:
    """A file's text. Raises RequestError, in one line that names the file, for what is none."""
    path = Path(path).expanduser()
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise RequestError(f"{path} is a folder; name a file in it")
        if size > MAX_FILE_BYTES:
            raise RequestError(
                f"{path} has {size >> 20} MB, more than any context holds; cut it below 64 MB"
            )
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise RequestError(f"no file at {path}; check the path") from None
    except UnicodeDecodeError as error:
        remedy = "convert it, e.g. with iconv -t UTF-8"
        raise RequestError(f"{path} is not UTF-8 text (byte {error.start}); {remedy}") from None
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
