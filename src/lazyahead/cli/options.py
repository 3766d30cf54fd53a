"""The options that commands share. An option that is left out takes the library's default."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from logging import ERROR
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lazyahead.cli.input import check_text, parse_path, unescape
from lazyahead.cli.progress import load_torch, progress
from lazyahead.errors import ConfigError
from lazyahead.strategies import parse_prefill

if TYPE_CHECKING:
    from lazyahead.config import Lookahead
    from lazyahead.llm import LLM
    from lazyahead.sampling import Sampling

BUILT_IN = "built-in reader"

# --- which model, and how it runs -----------------------------------------------------------------

Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="Folder, GGUF file or hub name. Left out: the built-in reader."
    ),
]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16 or int8 (CPU).")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 and so on.")]
TensorParallel = Annotated[
    int, typer.Option("--tp", min=1, help="Processes that share the model: one a GPU.")
]
Prefill = Annotated[
    str | None, typer.Option(help="off, a preset, or a profile (.toml). Left out: balanced.")
]
Decode = Annotated[str | None, typer.Option(help="off or lookahead.")]
Memory = Annotated[
    Path | None,
    typer.Option(parser=parse_path, help="File that keeps answers, to draft later ones from."),
]
Namespace = Annotated[
    str | None, typer.Option(help="Of the memory: a namespace never uses another's answers.")
]

# --- what is answered, and how --------------------------------------------------------------------

File = Annotated[
    Path | None,
    typer.Option("--file", "-f", parser=parse_path, help="Document; - for stdin."),
]
MaxNewTokens = Annotated[int | None, typer.Option(help="Longest answer, in tokens.")]
Temperature = Annotated[
    float | None, typer.Option(help="0 takes the most probable token; above 0 samples.")
]
TopK = Annotated[int | None, typer.Option(help="Sample among the k most probable tokens.")]
TopP = Annotated[
    float | None,
    typer.Option(help="Sample among the most probable tokens of this joint probability."),
]
Seed = Annotated[
    int | None, typer.Option(help="Same seed, same text. Left out: random, and reported.")
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help=r"End the answer before this text (\n: a new line). May be repeated."),
]

# --- what is measured -----------------------------------------------------------------------------

Runs = Annotated[int, typer.Option(min=1, help="Timed runs of each side; the median counts.")]
NumSamples = Annotated[int, typer.Option("--n", min=1, help="Samples of each category.")]
Length = Annotated[int, typer.Option(min=256, help="Prompt tokens, about.")]
SampleSeed = Annotated[
    int, typer.Option(min=0, help="Which samples are drawn, and what is dropped at random.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of stdout.")]


@dataclass(frozen=True)
class Loading:
    """Which model is loaded, and its prefill and decoding."""

    model: str | None = None
    dtype: str | None = None
    device: str | None = None
    prefill: str | None = None
    decode: str | None = None
    memory: Path | None = None
    namespace: str | None = None
    tp: int = 1

    @property
    def follows(self) -> bool:
        """Whether torchrun started this process as another rank than the first."""
        return self.tp > 1 and os.environ.get("RANK", "0") != "0"

    def given(self) -> dict[str, str]:
        """As plain values, for other processes: what was given, files by their whole paths. Raises
        ConfigError for strategies that there are not."""
        if self.prefill is not None:
            parse_prefill(self.prefill)
        parse_decode(self.decode, self.memory)
        values = {
            "model": self.model and _whole_path(self.model),
            "dtype": self.dtype,
            "device": self.device,
            "prefill": self.prefill and _whole_path(self.prefill),
            "decode": self.decode,
            "memory": str(self.memory.absolute()) if self.memory is not None else None,
        }
        return {name: value for name, value in values.items() if value is not None}

    def load(self) -> LLM:
        """Loads the model; a line on stderr where it is the built-in one."""
        given: dict[str, Any] = {"model": self.model, "dtype": self.dtype, "device": self.device}
        given = {name: value for name, value in given.items() if value is not None}
        if self.tp > 1:
            given["tp"] = self.tp
        if self.model is not None and self.model.startswith("~"):
            given["model"] = str(parse_path(self.model))
        if self.prefill is not None:
            given["prefill"] = parse_prefill(self.prefill)
        if self.decode is not None or self.memory is not None or self.namespace is not None:
            given["decode"] = parse_decode(self.decode, self.memory, self.namespace)
        if self.model is None:
            print("lazyahead: no --model given, using the built-in reader", file=sys.stderr)
        with progress("loading the model"), quiet_transformers():
            from lazyahead.llm import LLM

            llm = LLM(**given)
        if self.model is None:
            llm.name = BUILT_IN
        return llm


def _whole_path(name: str) -> str:
    """Of a file or folder that exists; any other name stays."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


def parse_decode(
    text: str | None, memory: Path | None = None, namespace: str | None = None
) -> Lookahead | None:
    """`off` or `lookahead`; a memory of answers means the latter."""
    from lazyahead.config import Lookahead

    if text not in (None, "off", "lookahead"):
        raise ConfigError(f"--decode is off or lookahead, got {text!r}")
    if namespace is not None and memory is None:
        raise ConfigError(f"--namespace {namespace!r} is of a memory; name its file with --memory")
    if text == "off":
        if memory is not None:
            raise ConfigError(
                f"--memory {str(memory)!r} is for --decode lookahead; leave one of them out"
            )
        return None
    given: dict[str, Any] = {"memory": memory and str(memory), "namespace": namespace}
    return Lookahead(**{name: value for name, value in given.items() if value is not None})


def make_sampling(**given: Any) -> Sampling:
    """Sampling from the options that were given. A seed is drawn here, so that it can be
    reported."""
    load_torch()
    from lazyahead.sampling import Sampling

    given = {name: value for name, value in given.items() if value is not None}
    if "stop" in given:
        given["stop"] = tuple(check_text("--stop", unescape(text)) for text in given["stop"])
    given.setdefault("seed", random.randrange(2**31))
    return Sampling(**given)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Warnings and bars of transformers and its hub are left out."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    before = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    hub_before = hub_logging.get_verbosity()
    logging.set_verbosity_error()
    hub_logging.set_verbosity(ERROR)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        hub_logging.set_verbosity(hub_before)
        if bars:
            logging.enable_progress_bar()
