"""One line of JSON a request, for operators. Prompts and answers only where they ask for them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.types import Scope

from lazyahead.results import Stats
from lazyahead.server.answers import Got
from lazyahead.server.settings import Settings


def note(request: Request, **fields: Any) -> None:
    """Adds to the line of this request."""
    request.scope["state"].setdefault("log", {}).update(fields)


def note_answer(request: Request, stats: Sequence[Stats], got: Sequence[Got]) -> None:
    """What became of it."""
    reasons = [one.piece.finish_reason for one in got if one.piece.finish_reason is not None]
    note(
        request,
        prompt_tokens=stats[0].prompt_tokens if stats else None,
        cached_tokens=stats[0].reused_tokens if stats else None,
        completion_tokens=sum(one.answer_tokens for one in stats),
        ttft_ms=round(1000 * min(one.ttft_s for one in stats), 1) if stats else None,
        finish_reasons=reasons,
        answer="".join(one.piece.text for one in got),
    )


def write(settings: Settings, scope: Scope, status: int, began: float, request_id: str) -> None:
    """The line, where the operator wants it."""
    if not settings.log_requests:
        return
    fields = dict(scope["state"].get("log", {}))
    if not settings.log_prompts:
        for name in ("prompt", "answer"):
            fields.pop(name, None)
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "request_id": request_id,
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "seconds": round(time.perf_counter() - began, 4),
        **fields,
    }
    print(json.dumps(line), file=sys.stderr, flush=True)
