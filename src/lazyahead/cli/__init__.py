"""The command line. Exit codes: 0 success, 2 the user's mistake (one line on stderr), 130 Ctrl-C, 1
anything else."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from lazyahead.errors import LazyAheadError, OutOfMemoryError

INTERRUPTED = 130


def main() -> None:
    """Entry of the `lazyahead` script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code."""
    from lazyahead.cli.app import app

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return int(app(list(arguments), standalone_mode=False) or 0)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except LazyAheadError as error:
        complain(str(error))
        return 1 if isinstance(error, OutOfMemoryError) else 2
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        complain(
            error.format_message() or "give a command; `lazyahead --help` lists them"
        )  # the parser's own
        return 2


def complain(message: str) -> None:
    """One line on stderr."""
    print(f"lazyahead: {' '.join(message.split())}", file=sys.stderr, flush=True)
