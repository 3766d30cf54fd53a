"""The command line.

Exit codes: 0 success, 2 the user's mistake (one line on stderr), 130 Ctrl-C, 1 anything else.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import TextIO

import typer

from lazyahead.errors import LazyAheadError, OutOfMemoryError, RankError

INTERRUPTED = 130


def main() -> None:
    """Entry of the `lazyahead` script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code."""
    # read by OpenMP when torch is loaded: idle threads sleep rather than spin on a shared machine
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _use_utf8(sys.stdout)
    from lazyahead.cli.app import app

    try:
        return int(app(list(arguments), standalone_mode=False) or 0)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has closed it
        _discard_stdout()
        return 1
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _discard_stdout()
        complain(f"the output cannot be written: {error.strerror}")
        return 1
    except LazyAheadError as error:
        complain(str(error))
        return 1 if isinstance(error, OutOfMemoryError | RankError) else 2
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        # an error of the option parser
        complain(error.format_message() or "give a command; `lazyahead --help` lists them")
        return 2


def _use_utf8(stream: TextIO) -> None:
    """A stream that is no terminal gets UTF-8; on a terminal, characters that its encoding lacks
    are replaced. No character makes printing fail."""
    if isinstance(stream, io.TextIOWrapper):
        encoding = stream.encoding if stream.isatty() else "utf-8"
        stream.reconfigure(encoding=encoding, errors="replace")


def _discard_stdout() -> None:
    """What is still buffered is not written, so that Python's own flush at the end succeeds."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(message: str) -> None:
    """One line on stderr."""
    print(f"lazyahead: {' '.join(message.split())}", file=sys.stderr, flush=True)
