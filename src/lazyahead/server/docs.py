"""What the OpenAPI document says beside the schemas."""

from __future__ import annotations

from typing import Any

from lazyahead.server.reply import ErrorReply

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorReply, "description": "A field that is wrong, or that is not honoured."},
    401: {"model": ErrorReply, "description": "No API key, or a wrong one."},
    403: {"model": ErrorReply, "description": "A Host that this server does not go by."},
    404: {"model": ErrorReply, "description": "No such model or response."},
    408: {"model": ErrorReply, "description": "The body did not arrive in time."},
    413: {"model": ErrorReply, "description": "The body is too large."},
    429: {"model": ErrorReply, "description": "The queue is full; see Retry-After."},
    500: {"model": ErrorReply, "description": "The pass failed."},
    503: {"model": ErrorReply, "description": "Shutting down, or the model's thread has ended."},
    504: {"model": ErrorReply, "description": "The request took too long."},
}
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
