"""`lazyahead serve`: an OpenAI-compatible server with a page."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lazyahead.cli import options
from lazyahead.cli.input import parse_path
from lazyahead.cli.output import note
from lazyahead.errors import ConfigError

if TYPE_CHECKING:
    from lazyahead.server.settings import Settings

LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")
KEY_VARIABLE = "LAZYAHEAD_API_KEY"


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    model: options.Model = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    tp: options.TensorParallel = 1,
    ray: Annotated[bool, typer.Option("--ray", help="Several replicas, run by Ray Serve.")] = False,
    replicas: Annotated[int | None, typer.Option(min=1, help="With --ray: how many.")] = None,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="With --ray: how many while there is work for them.")
    ] = None,
    prefill: options.Prefill = None,
    decode: Annotated[
        str | None,
        typer.Option(help="off or lookahead, for requests that do not say. Left out: lookahead."),
    ] = None,
    memory: options.Memory = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="What requests call the model.")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help=f"Key that requests must bring; may be repeated. Also {KEY_VARIABLE}."),
    ] = None,
    shared_namespace: Annotated[
        list[str] | None,
        typer.Option(help="Namespace that all keys share; may be repeated."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Name that the server goes by; may be repeated. Left out: on a loopback address "
            "only that, else any."
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Origin whose pages may call the server; may be repeated."),
    ] = None,
    max_running: Annotated[int | None, typer.Option(help="Requests in one pass.")] = None,
    max_running_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens that they may come to hold. Left out: what half of the free memory takes."
        ),
    ] = None,
    max_queue: Annotated[int | None, typer.Option(help="Requests that may wait.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.")] = None,
    max_body_bytes: Annotated[int | None, typer.Option(help="Largest request.")] = None,
    max_prompt_chars: Annotated[int | None, typer.Option(help="Longest prompt.")] = None,
    request_timeout_s: Annotated[float | None, typer.Option(help="Longest request.")] = None,
    drain_s: Annotated[
        float | None, typer.Option(help="After SIGTERM, how long answers may go on.")
    ] = None,
    cache_bytes: Annotated[
        int | None,
        typer.Option(help="Memory for what prompts begin with and others share; 0: none."),
    ] = None,
    documents: Annotated[
        Path | None,
        typer.Option(
            parser=parse_path, help="Folder for documents read ahead, as `index` writes it."
        ),
    ] = None,
    response_ttl_s: Annotated[
        float | None, typer.Option(help="How long /v1/responses can be continued.")
    ] = None,
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="One line of JSON a request on stderr.")
    ] = False,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Prompts and answers in those lines too.")
    ] = False,
) -> None:
    """Answers the OpenAI API, until SIGTERM or Ctrl-C."""
    settings = _settings(
        model_name=served_model_name,
        api_keys=_keys(api_key),
        shared_namespaces=tuple(shared_namespace or ()),
        allowed_hosts=_hosts(host, allowed_host or []),
        cors_origins=tuple(cors_origin or ()),
        max_running=max_running,
        max_running_tokens=max_running_tokens,
        max_queue=max_queue,
        max_tokens=max_tokens,
        max_body_bytes=max_body_bytes,
        max_prompt_chars=max_prompt_chars,
        request_timeout_s=request_timeout_s,
        drain_s=drain_s,
        cache_bytes=cache_bytes,
        documents=documents,
        response_ttl_s=response_ttl_s,
        log_requests=log_requests,
        log_prompts=log_prompts,
    )
    decode = "lookahead" if decode is None else decode
    loading = options.Loading(model, dtype, device, prefill, decode, memory, None, tp)
    if ray:
        code = _serve_replicas(loading, settings, host, port, replicas, max_replicas)
    elif replicas is not None or max_replicas is not None:
        raise ConfigError("--replicas and --max-replicas go with --ray")
    else:
        code = _serve_here(loading, settings, host, port)
    if code:
        raise typer.Exit(code)


def _serve_here(loading: options.Loading, settings: Settings, host: str, port: int) -> int:
    """In this process. Returns the exit code."""
    from lazyahead.server.run import bind
    from lazyahead.server.run import serve as run

    if loading.follows:
        loading.load()  # does not return
    bound = bind(host, port)  # before the model, which takes its time
    llm = loading.load()
    from lazyahead.server.app import create_app

    try:
        app = create_app(llm, settings)
        name = app.state.service.model_name
        return run(app, bound, lambda port: _greet(host, port, name, bool(settings.api_keys)))
    finally:
        llm.close()


def _serve_replicas(
    loading: options.Loading,
    settings: Settings,
    host: str,
    port: int,
    replicas: int | None,
    max_replicas: int | None,
) -> int:
    """In processes that Ray Serve starts. Returns the exit code."""
    if loading.tp > 1:
        raise ConfigError("--tp and --ray cannot be combined; give each replica one GPU")
    given: dict[str, Any] = loading.given()
    num = replicas or 1
    if max_replicas is not None and max_replicas < num:
        raise ConfigError(f"--max-replicas {max_replicas} is less than --replicas {num}")
    try:
        from lazyahead.server.ray_run import cores, run
    except ImportError as error:
        raise ConfigError(
            f"--ray needs {error.name}; install it with: pip install 'lazyahead[ray]'"
        ) from None
    from lazyahead.server.ray import RayOptions

    asked = RayOptions(
        replicas=num,
        max_replicas=max_replicas,
        cpus=cores(max_replicas or num),
        settings=settings,
        **given,
    )
    name = settings.model_name or loading.model or options.BUILT_IN
    return run(asked, host, port, lambda port: _greet(host, port, name, bool(settings.api_keys)))


def _settings(**given: Any) -> Settings:
    """What was given; the rest as `Settings` has it. Raises ConfigError without the extra."""
    try:
        from lazyahead.server.settings import Settings
    except ImportError as error:
        raise ConfigError(
            f"serve needs {error.name}; install it with: pip install 'lazyahead[serve]'"
        ) from None
    known = {field.name for field in fields(Settings)}
    assert given.keys() <= known
    return Settings(**{name: value for name, value in given.items() if value is not None})


def _keys(given: list[str] | None) -> tuple[str, ...]:
    """From the command line, else from the environment."""
    if given:
        return tuple(given)
    value = os.environ.get(KEY_VARIABLE, "")
    return (value,) if value else ()


def _hosts(host: str, named: list[str]) -> tuple[str, ...]:
    """Names that requests may use: any where the server listens to other machines, unless some are
    named."""
    if host not in LOOPBACK and not named:
        return ()
    return tuple({*LOOPBACK, f"[{host}]" if ":" in host else host, *map(str.lower, named)})


def _greet(host: str, port: int, model: str, needs_key: bool) -> None:
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else shown}:{port}"
    key = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if needs_key else ""
    note(f"{model} is served; the page is at {url}/ and the API at {url}/v1. Try:")
    print(
        f"curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' "
        """-d '{"messages": [{"role": "user", "content": "Hello"}]}'""",
        flush=True,
    )
