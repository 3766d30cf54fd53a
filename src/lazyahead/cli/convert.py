"""`lazyahead convert`: a GGUF file to a safetensors folder, once, as dequantising takes long."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from lazyahead.cli import options
from lazyahead.cli.output import envelope, note, print_json, seconds
from lazyahead.cli.progress import progress
from lazyahead.errors import ConfigError

DTYPES = ("bfloat16", "float16", "float32")
File = Annotated[Path, typer.Argument(help="The GGUF file.", show_default=False)]
Folder = Annotated[Path, typer.Argument(help="A new or empty folder.", show_default=False)]
Dtype = Annotated[str, typer.Option(help="Of the weights written: bfloat16, float16 or float32.")]


def convert(
    file: File, folder: Folder, dtype: Dtype = "bfloat16", json: options.Json = False
) -> None:
    """Writes FILE.gguf as a safetensors folder with tokenizer and generation config."""
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    from lazyahead.hf.gguf import check_target, convert_gguf

    check_target(folder)
    started = time.perf_counter()
    with options.quiet_transformers(), progress("converting") as report:
        model = convert_gguf(file, folder, dtype, report)
    took = time.perf_counter() - started
    size = sum(path.stat().st_size for path in folder.iterdir())
    if json:
        results: dict[str, Any] = {"folder": str(folder), "bytes": size, "seconds": took}
        results["num_parameters"] = model.num_parameters()
        where = (model.device, model.dtype)
        print_json(envelope(str(file), where, {"dtype": dtype}, None, 1, results))
    else:
        note(f"wrote {folder}: {size / 1e6:,.0f} MB of {dtype}, in {seconds(took)}")
