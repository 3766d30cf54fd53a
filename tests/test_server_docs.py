"""docs/server.md names what there is, and importing the library asks for nothing of the server."""

import subprocess
import sys
from pathlib import Path

import typer
from prometheus_client.parser import text_string_to_metric_families
from serving import tiny_llm

from lazyahead.cli.app import app
from lazyahead.server.app import create_app
from lazyahead.server.schema import ChatRequest, CompletionRequest, Extension
from lazyahead.server.settings import Settings

PAGE = (Path(__file__).parents[1] / "docs" / "server.md").read_text(encoding="utf-8")
NEUTRAL = {"response_format", "tools", "tool_choice", "store", "service_tier", "modalities"}


def test_every_metric_is_documented():
    service = create_app(tiny_llm()).state.service
    for family in text_string_to_metric_families(service.metrics.text().decode()):
        name = family.name.removeprefix("lazyahead:").removesuffix("_created")
        assert f"`{name}" in PAGE, name


def test_every_endpoint_and_honoured_field_is_documented():
    for path in create_app(tiny_llm()).openapi()["paths"]:
        assert f"{path.removesuffix('/{name}')}`" in PAGE, path
    fields = {*ChatRequest.model_fields, *CompletionRequest.model_fields, *Extension.model_fields}
    for field in fields - NEUTRAL - {"best_of", "suffix", "messages", "prompt", "model"}:
        assert f"`{field}" in PAGE, field


def test_options_that_are_documented_exist_with_their_defaults():
    (command,) = [c for c in typer.main.get_command(app).commands.values() if c.name == "serve"]
    options = {name for param in command.params for name in param.opts}
    rows = [line.split("|")[1:3] for line in PAGE.splitlines() if line.startswith("| `--")]
    assert len(rows) == 9
    for option, default in ((a.strip(" `"), b.strip()) for a, b in rows):
        assert option in options
        value = getattr(Settings(), option.removeprefix("--").replace("-", "_"))
        shown = value >> 20 if default.endswith("MiB") else value
        assert float(default.removesuffix(" MiB").replace(",", "")) == shown


def test_importing_the_library_or_its_commands_asks_for_nothing_of_the_server():
    code = (
        "import sys, lazyahead, lazyahead.cli.app\n"
        "assert not {'fastapi', 'uvicorn', 'pydantic', 'prometheus_client'} & set(sys.modules)\n"
        "sys.modules['fastapi'] = None\n"
        "from lazyahead.cli import run\n"
        "assert run(['serve']) == 2"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pip install 'lazyahead[serve]'" in done.stderr
