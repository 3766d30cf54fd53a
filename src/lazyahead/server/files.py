"""What the page reads: PDF files, and an example."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from lazyahead.reader.tasks import samples
from lazyahead.server.errors import ApiError
from lazyahead.server.reply import ErrorReply, Example, Extracted, dump
from lazyahead.server.service import Service
from lazyahead.text.detokenizer import Tokenizer

router = APIRouter()
_PROGRAM = Path(__file__).with_name("pdf_text.py")
_MAX_MEMORY = 2 << 30  # bytes of address space, of the process that reads a PDF
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
_NO_PYPDF: dict[int | str, dict[str, Any]] = {
    501: {"model": ErrorReply, "description": "The server has no pypdf."}
}


@router.post("/v1/extract", response_model=Extracted, openapi_extra=_BODY, responses=_NO_PYPDF)
async def extract(request: Request) -> Response:
    """The text of a PDF, whose bytes are the body."""
    service: Service = request.app.state.service
    data = await request.body()
    if b"%PDF-" not in data[:1024]:
        raise ApiError(400, "the body is no PDF; it must begin with %PDF-", code="invalid_pdf")
    if importlib.util.find_spec("pypdf") is None:
        raise ApiError(
            501,
            "this server cannot read PDF files; install pypdf on it: pip install 'lazyahead[pdf]'",
            code="pdf_unsupported",
        )
    async with service.pdf_places:
        told = await _read(data, service)
    if "error" in told:
        raise ApiError(400, told["error"], code="invalid_pdf")
    return JSONResponse(dump(Extracted(**told)))


async def _read(data: bytes, service: Service) -> dict[str, Any]:
    """What the program says of it."""
    limits = service.settings
    most = (limits.max_pdf_pages, limits.max_prompt_chars, _MAX_MEMORY)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        str(_PROGRAM),
        *map(str, most),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(limits.pdf_timeout_s):
            output, _ = await process.communicate(data)
    except TimeoutError:
        return {"error": f"the PDF took longer to read than {limits.pdf_timeout_s:g} s"}
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    try:
        told: dict[str, Any] = json.loads(output)
    except ValueError:
        return {"error": "the PDF cannot be read; the program that reads it has failed"}
    return told


@router.get("/v1/example", response_model=Example)
async def example(request: Request) -> Response:
    """A document to try the page with, and questions about it that the model can answer."""
    service: Service = request.app.state.service
    num_tokens = min(4096, service.llm.max_context * 3 // 4)
    if service.is_reader:
        made = _invented(num_tokens)
    else:
        made = await service.in_thread(_reference, service.llm.tokenizer, num_tokens)
    return JSONResponse(dump(made))


def _invented(num_tokens: int) -> Example:
    """What the built-in reader was trained to read."""
    (sample,) = samples("rag", length=max(256, num_tokens), seed=7)
    questions = [sample.question, *(question for question, _ in sample.others[:2])]
    return Example(name="Invented places", text=sample.document, questions=questions)


def _reference(tokenizer: Tokenizer, num_tokens: int) -> Example:
    """Of Python's own language reference, so many tokens."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name].strip() for name in ("with", "try", "raise", "assignment"))
    count = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return Example(
        name="Python's language reference",
        text=text[: len(text) * num_tokens // max(num_tokens, count)].strip(),
        questions=[
            "What is the with statement used for?",
            "When is the finally clause of a try statement executed?",
        ],
    )
