"""The app: endpoints, errors, and the gate in front of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from lazyahead.errors import ConfigError
from lazyahead.llm import LLM
from lazyahead.server import chat, completions, documents, errors, files, info, responses
from lazyahead.server.docs import ERRORS
from lazyahead.server.gate import Gate
from lazyahead.server.service import Service
from lazyahead.server.settings import Settings

ROUTERS = (
    *(chat.router, completions.router, responses.router),
    *(documents.router, info.router, files.router),
)


def create_app(llm: LLM, settings: Settings | None = None, *, drafts: bool = True) -> FastAPI:
    """An ASGI app that serves the model. Its worker runs while the app's lifespan does.

    `drafts`: whether requests are drafted that do not say. Raises ConfigError for a model without
    a tokenizer.
    """
    if llm.tokenizer is None:
        raise ConfigError("a server needs a tokenizer; give the LLM one")
    service = Service(llm, settings or Settings(), drafts=drafts)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            service.stop()

    app = FastAPI(
        title="lazyahead",
        version=version("lazyahead"),
        lifespan=lifespan,
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        responses=ERRORS,
    )
    app.state.service = service
    errors.install(app)
    for router in ROUTERS:
        app.include_router(router)
    app.add_middleware(Gate, service=service)
    if service.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
        )
    _without_422(app)
    return app


def _without_422(app: FastAPI) -> None:
    """FastAPI documents 422 for what is wrong with a body; here that is 400."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        document = made()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return document

    app.openapi = openapi  # type: ignore[method-assign]
