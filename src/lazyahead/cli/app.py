"""Which commands there are."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from lazyahead.cli.bench import app as bench
from lazyahead.cli.chat import chat
from lazyahead.cli.convert import convert
from lazyahead.cli.doctor import doctor
from lazyahead.cli.evaluate import PASS_ON, evaluate
from lazyahead.cli.generate import generate
from lazyahead.cli.index import index
from lazyahead.cli.memory import app as memory
from lazyahead.cli.serve import serve
from lazyahead.cli.tune import tune
from lazyahead.cli.verify import verify

app = typer.Typer(
    name="lazyahead",
    help="Makes a Hugging Face decoder-only LLM answer sooner on long prompts.",
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Makes a Hugging Face decoder-only LLM answer sooner on long prompts."""
    if show_version:
        print(version("lazyahead"))
        raise typer.Exit()
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit()


app.command()(generate)
app.command()(chat)
app.command()(serve)
app.command()(index)
app.command()(doctor)
app.command()(verify)
app.command()(convert)
app.command()(tune)
app.command("eval", context_settings=PASS_ON)(evaluate)
app.add_typer(bench, name="bench", help="Measure, beside plain transformers.")
app.add_typer(memory, name="memory", help="Look into a memory of answers, add to it, clear it.")
