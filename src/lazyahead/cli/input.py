"""What users give: text from arguments, files and stdin, and paths."""

from __future__ import annotations

import os
import re
import stat
import sys
from pathlib import Path

from lazyahead.errors import RequestError
from lazyahead.text import read_text

STDIN = Path("-")
_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\\": "\\"}


def parse_path(text: str) -> Path:
    """A path with `~` expanded."""
    return Path(text).expanduser()


def unescape(text: str) -> str:
    r"""`\n`, `\t`, `\r` and `\\` as the characters that they stand for; all else as it is."""
    return re.sub(r"\\[ntr\\]", lambda found: _ESCAPES[found[0]], text)


def check_text(name: str, text: str) -> str:
    """The text. Raises RequestError naming `name` where it holds half a character: bytes that are
    not UTF-8, or one half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name} is not UTF-8 text (character {error.start}); convert it to UTF-8"
        ) from None
    return text


def decode_text(name: str, data: bytes) -> str:
    """UTF-8 bytes to text, a byte order mark left out. Raises RequestError naming `name`."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{name} is not UTF-8 text (byte {error.start}); convert it to UTF-8"
        ) from None


def read_stdin() -> str:
    """All of stdin. Raises RequestError where it is not UTF-8."""
    return decode_text("stdin", sys.stdin.buffer.read())


def is_piped() -> bool:
    """Whether stdin is a pipe or a file, rather than a terminal, /dev/null or closed."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):  # closed, or replaced by a test
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def read_document(
    prompt: str | None, file: Path | None, question: str | None, *, piped: bool = True
) -> str:
    """The text of PROMPT, of --file, or of stdin: for `-`, and where it is `piped` and neither of
    the others is given. Raises RequestError where nothing is given at all, or both."""
    if prompt is not None and file is not None:
        raise RequestError(
            "give PROMPT or --file, not both; a question about the file goes into --question"
        )
    if prompt == "-" or file == STDIN:
        document = read_stdin()
    elif file is not None:
        document = read_text(file)
    elif prompt is None and piped and is_piped():
        document = read_stdin()
    else:
        document = check_text("the prompt", prompt or "")
    question = check_text("--question", question or "")
    if not (document.strip() or question.strip()):
        raise RequestError("the prompt is empty; give PROMPT, --file or --question")
    return document
