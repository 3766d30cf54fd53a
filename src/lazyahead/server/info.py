"""What the server tells of itself: health, models, tokens, metrics, the page."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse

from lazyahead.server.chat import read_chat
from lazyahead.server.errors import ApiError, shutting_down
from lazyahead.server.page import page as made_page
from lazyahead.server.reply import Detokenized, Model, ModelList, Tokenized, dump
from lazyahead.server.schema import DetokenizeRequest, TokenizeRequest
from lazyahead.server.service import Service
from lazyahead.text.prompt import check_length

router = APIRouter()


@router.get("/", include_in_schema=False)
async def page() -> Response:
    made = made_page()
    return HTMLResponse(made.html, headers=made.headers)


@router.get("/health", response_class=JSONResponse)
async def health(request: Request) -> dict[str, str]:
    """200 while the model's thread runs, else 503."""
    service: Service = request.app.state.service
    if not service.worker.is_alive:
        raise ApiError(503, "the model's thread has ended", code="worker_dead")
    return {"status": "ok"}


@router.get("/ready", response_class=JSONResponse)
async def ready(request: Request) -> dict[str, str]:
    """200 while requests are taken, else 503."""
    service: Service = request.app.state.service
    if service.is_draining:
        raise shutting_down()
    return await health(request)


@router.get("/version")
async def versions() -> dict[str, str]:
    return {"version": version("lazyahead")}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """In Prometheus's text format."""
    service: Service = request.app.state.service
    return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models")
async def models(request: Request) -> ModelList:
    return ModelList(object="list", data=[_model(request)])


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> Model:
    service: Service = request.app.state.service
    service.check_model(name)
    return _model(request)


def _model(request: Request) -> Model:
    service: Service = request.app.state.service
    return Model(
        id=service.model_name,
        object="model",
        created=service.started,
        owned_by="lazyahead",
        max_model_len=service.llm.max_context,
    )


@router.post("/tokenize", response_model=Tokenized)
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """Text, or messages through the chat template, to tokens."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    tokenizer = service.llm.tokenizer
    if body.messages is not None:
        tokens = (await read_chat(service, body.messages)).token_ids
    else:
        text = body.prompt or ""
        service.check_chars(len(text))
        tokens = await service.in_thread(_tokens, service, text, body.add_special_tokens)
    told = Tokenized(tokens=tokens, count=len(tokens), max_model_len=service.llm.max_context)
    if body.return_token_strs:
        told.token_strs = tokenizer.convert_ids_to_tokens(tokens)
    return JSONResponse(dump(told))


def _tokens(service: Service, text: str, add_special_tokens: bool) -> list[int]:
    tokenizer: Any = service.llm.tokenizer
    check_length(tokenizer, text, service.llm.max_context)
    found = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
    return list(found["input_ids"])


@router.post("/detokenize", response_model=Detokenized)
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    service: Service = request.app.state.service
    service.check_model(body.model)
    size = len(service.llm.tokenizer)
    if any(token >= size for token in body.tokens):
        raise ApiError(400, f"token ids are below {size}, got {max(body.tokens)}", param="tokens")
    text = await service.in_thread(service.llm.tokenizer.decode, body.tokens)
    return JSONResponse(dump(Detokenized(prompt=text)))
