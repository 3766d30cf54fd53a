"""What an operator decides: the whole of a server's settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lazyahead.checks import check_count, is_number
from lazyahead.errors import ConfigError

KEY_VARIABLE = "LAZYAHEAD_API_KEY"
"""Environment variable with a key, where none is given."""
_COUNTS = (
    "max_running",
    "max_body_bytes",
    "max_prompt_chars",
    "max_tokens",
    "max_n",
    "max_stops",
    "max_logit_bias",
    "max_namespaces",
    "max_connections",
    "prefill_chunk_size",
    "max_prefill_rows",
    "max_pdf_pages",
    "max_pdfs",
)
_TIMES = ("request_timeout_s", "body_timeout_s", "progress_s", "pdf_timeout_s")


@dataclass(frozen=True)
class Settings:
    """Limits and access. Raises ConfigError for a value that cannot mean anything."""

    model_name: str | None = None
    """What requests call the model; None: its folder's or hub's name."""
    api_keys: tuple[str, ...] = ()
    """A request must bring one of them; none: no key is asked for."""
    shared_namespaces: tuple[str, ...] = ()
    """Namespaces that all API keys share; any other belongs to one key."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that a request's Host may have; none: any. Where a server listens on this machine alone
    this keeps out web pages whose name was made to lead here."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call the server."""
    max_running: int = 16
    """Requests in one pass."""
    max_queue: int = 64
    """Requests that may wait beyond those; further ones get 429."""
    max_running_tokens: int | None = None
    """Tokens that requests in one pass may come to hold, prompts and answers: further requests
    wait. None: as many as fit into half of the memory that is free at the start."""
    prefill_chunk_size: int = 512
    """Rows of a prompt in a pass that others share."""
    max_prefill_rows: int = 1024
    """Rows of a prompt in a pass of its own: others join after it."""
    max_body_bytes: int = 16 << 20
    max_prompt_chars: int = 4_000_000
    """Characters of a prompt, counted before it is tokenised."""
    max_tokens: int = 4096
    """Longest answer."""
    max_n: int = 16
    """Answers to one prompt."""
    max_stops: int = 16
    max_logit_bias: int = 1024
    max_namespaces: int = 64
    """Namespaces that requests may name, over all keys."""
    max_connections: int = 512
    request_timeout_s: float = 600.0
    """From a request's body to the end of its answer."""
    body_timeout_s: float = 30.0
    """Within which a body must have arrived."""
    max_pdf_pages: int = 2000
    pdf_timeout_s: float = 60.0
    """Within which a PDF must have been read."""
    max_pdfs: int = 2
    """PDF files that are read at the same time; further ones wait."""
    progress_s: float = 1.0
    """Between two comments that tell how far a prompt was read."""
    drain_s: float = 30.0
    """After SIGTERM, how long answers may go on."""
    cache_bytes: int = 1 << 30
    """Most memory for what prompts begin with and others share; 0: nothing is shared."""
    documents: Path | None = None
    """A folder for documents that were read ahead; None: they are kept in memory only."""
    response_ttl_s: float = 3600.0
    """How long a response can be continued with `previous_response_id`."""
    response_cache_bytes: int = 1 << 30
    """Most memory that such responses take, texts and sessions; 0 keeps none."""
    log_requests: bool = False
    """One line of JSON a request, on stderr."""
    log_prompts: bool = False
    """Prompt and answer in those lines too."""

    def __post_init__(self) -> None:
        for name in _COUNTS:
            check_count(name, getattr(self, name), 1)
        for name in ("max_queue", "cache_bytes", "response_cache_bytes"):
            check_count(name, getattr(self, name), 0)
        if self.max_running_tokens is not None:
            check_count("max_running_tokens", self.max_running_tokens, 1)
        for name in _TIMES:
            if not (is_number(getattr(self, name)) and getattr(self, name) > 0):
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)!r}")
        for name in ("drain_s", "response_ttl_s"):
            if not (is_number(getattr(self, name)) and getattr(self, name) >= 0):
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)!r}")
        for key in self.api_keys:
            if not (key and key.isascii() and key.isprintable() and " " not in key):
                raise ConfigError("an API key is printable ASCII without spaces, and not empty")
        if self.documents is not None and not self.cache_bytes:
            raise ConfigError("documents are read into the prefix cache; give it cache_bytes")
        if self.log_prompts and not self.log_requests:
            raise ConfigError("log_prompts adds to the lines of log_requests; set that too")
