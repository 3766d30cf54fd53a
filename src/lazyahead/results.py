"""What a request gives back. CLI, benchmarks and servers read these objects, so they cannot
disagree."""

from __future__ import annotations

from dataclasses import dataclass, field

from lazyahead.draft.tree import Source


@dataclass(frozen=True)
class Stats:
    """Measurements of one request, as of the moment they were taken. Times in seconds, lengths in
    tokens."""

    prompt_tokens: int
    """Length of the whole prompt, reused part included."""
    reused_tokens: int
    """Prompt tokens taken over from a session."""
    answer_tokens: int
    ttft_s: float
    """From submission to the first token (waiting included)."""
    decode_s: float
    """From the first token to the last."""
    prompt_tokens_computed: float
    """Mean over layers of the fraction of prompt tokens that have keys and values there, revived
    ones included."""
    num_steps: int
    """Forward passes after the prefill."""
    revived: int
    """Tokens revived at some boundary since this request began, counted once per boundary."""
    kept_by_layer: tuple[int, ...] = ()
    """Prompt tokens computed at each layer."""

    @property
    def tokens_per_step(self) -> float:
        """Tokens that one decode pass gave, on average (1.0 without drafting)."""
        return (self.answer_tokens - 1) / self.num_steps if self.num_steps else 1.0

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed after the first token; 0 where there was nothing to time."""
        return (self.answer_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0


@dataclass(frozen=True)
class Piece:
    """The answer tokens of one step, the text they complete, and the measurements so far."""

    text: str
    token_ids: tuple[int, ...]
    stats: Stats
    finish_reason: str | None = None
    """None while running, then ``stop`` (EOS or stop string), ``length``, or ``cancelled``."""
    sources: tuple[Source | None, ...] = ()
    """Where each of `token_ids` was drafted from; None: the model's own pick. Empty: not told."""


@dataclass(frozen=True)
class Completion:
    """A finished answer: the pieces, folded."""

    text: str
    token_ids: tuple[int, ...]
    stats: Stats
    finish_reason: str
    sources: tuple[Source | None, ...] = ()
    """As of the pieces."""

    @classmethod
    def fold(cls, pieces: list[Piece]) -> Completion:
        """Streaming is the truth, this is its sum. Raises ValueError on an empty list."""
        if not pieces:
            raise ValueError("no pieces to fold: the stream yields at least one")
        last = pieces[-1]
        text = "".join(piece.text for piece in pieces)
        token_ids = tuple(token for piece in pieces for token in piece.token_ids)
        sources = tuple(source for piece in pieces for source in piece.sources)
        return cls(text, token_ids, last.stats, last.finish_reason or "cancelled", sources)


@dataclass(frozen=True)
class Reach:
    """How deep each prompt token got: the data behind ``--explain``."""

    token_ids: tuple[int, ...]
    depth: tuple[int, ...]
    """Number of layers at which the token has keys and values when the answer ended."""
    prefill_depth: tuple[int, ...]
    """The same at the end of the prefill; ``depth > prefill_depth`` marks a revived token."""
    num_layers: int
    answer_ids: tuple[int, ...] = field(default=())
