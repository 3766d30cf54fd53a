"""What callers hand over as text, checked and brought into one form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lazyahead.errors import RequestError

Message = dict[str, Any]
"""A turn of a chat: `role` and `content`, a text."""


def check_text(text: object, what: str) -> str:
    """The text. Raises RequestError, naming `what` it is, for another type and for text that UTF-8
    cannot hold."""
    if not isinstance(text, str):
        raise RequestError(f"{what} must be a text, got {type(text).__name__} {text!r:.60}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{what} has half a character at place {error.start} ({text[error.start]!a}), which "
            "no UTF-8 text can hold; decode its bytes anew, e.g. with errors='replace'"
        ) from None
    return text


def read_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The messages, each with its content as one text. Raises RequestError for none at all, for one
    without a role, and for content that is no text."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise RequestError(
            f"messages must be a list of role and content, got {type(messages).__name__}"
        )
    if not messages:
        raise RequestError("there are no messages; give at least one of role 'user'")
    return [_read(message, f"message {place}") for place, message in enumerate(messages)]


def _read(message: Mapping[str, Any], what: str) -> Message:
    if not isinstance(message, Mapping):
        raise RequestError(f"{what} must have role and content, got {message!r:.60}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise RequestError(f"{what} has no role; it is one of 'system', 'user', 'assistant'")
    if content is None:
        content = ""
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        content = "\n".join(_part(part, what) for part in content)
    return {**message, "role": role, "content": check_text(content, f"the content of {what}")}


def _part(part: object, what: str) -> str:
    """The text of one part of a content."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if not isinstance(part, Mapping) or kind != "text":
        raise RequestError(f"{what} has a part of type {kind!r}; only 'text' can be read")
    return check_text(part.get("text"), f"a part of {what}")
