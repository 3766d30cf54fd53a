"""`lazyahead doctor`: what is supported for a model on this machine, and the reason if not all."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import psutil
from rich.table import Table

from lazyahead.cli import options
from lazyahead.cli.output import envelope, note, print_json, tables
from lazyahead.cli.progress import load_torch, progress
from lazyahead.errors import UnsupportedModelError

if TYPE_CHECKING:
    from lazyahead.hf.probe import Support


OMP_ADVICE = (
    "In your own programs on a shared CPU, set OMP_WAIT_POLICY=passive before torch is imported, "
    "as this command does: idle threads then sleep instead of spinning."
)

NOT_EXACT = (
    "Here a product's rows depend in their last bits on how many they are: drafted, batched and "
    "plain answers may differ where two tokens are nearly tied."
)

NO_LOOPS = {
    "cpu": "Here bfloat16 runs without compiled loops (they need AVX-512 bf16 and a C compiler, "
    "cc, gcc or clang): a decode step takes about half as long again.",
    "cuda": "Here half precision runs without kernels of its own (they need the package triton, a "
    "C compiler and compute capability 8.0): a decode step takes about 1.4 times as long.",
}


def doctor(
    model: options.Model = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Says what is supported for a model: full, decode-only or none, and why."""
    load_torch()
    import torch

    from lazyahead.hf.attach import dtype_name
    from lazyahead.hf.int8 import why_not
    from lazyahead.hf.load import load, max_context
    from lazyahead.hf.native import native
    from lazyahead.hf.probe import Support, probe
    from lazyahead.hf.steady import fewest_rows, is_steady
    from lazyahead.hf.triton_loops import DTYPES, triton_loops
    from lazyahead.reader import reader_path

    where: tuple[torch.device, str] = (torch.device("cpu"), str(torch.get_default_dtype()))
    more: dict[str, Any] = {}
    with progress("loading and probing the model"), options.quiet_transformers():
        try:
            loaded, tokenizer = load(model or str(reader_path()), dtype or "auto", device or "auto")
        except UnsupportedModelError as error:
            support = Support("none", str(error), "unknown", 0)
        else:
            support = probe(loaded)
            where = (loaded.device, dtype_name(loaded))
            num_rows = fewest_rows(loaded.device, loaded.dtype)
            more = {
                "num_parameters": sum(parameter.numel() for parameter in loaded.parameters()),
                "max_context": max_context(loaded),
                "exact": loaded.dtype == torch.float32 or (num_rows > 1 and is_steady()),
                "chat_template": bool(tokenizer.chat_template),
            }
            if loaded.device.type == "cuda" and loaded.dtype in DTYPES:
                more["compiled_loops"] = triton_loops(next(loaded.parameters())) is not None
            if loaded.device.type == "cpu" and loaded.dtype == torch.bfloat16:
                more["compiled_loops"] = native() is not None
                more["int8"] = why_not() is None
    fields = {**_support_fields(support), **more}
    fields["free_memory_gb"] = round(psutil.virtual_memory().available / 2**30, 1)
    fields["omp_wait_policy"] = os.environ.get("OMP_WAIT_POLICY", "")
    values = envelope(model or options.BUILT_IN, where, {}, None, 0, fields)
    if json:
        print_json(values)
    else:
        _show(values["model"], {**fields, **values["machine"]})
        note(OMP_ADVICE)
        if not fields.get("exact", True):
            note(NOT_EXACT)
        if not fields.get("compiled_loops", True):
            note(NO_LOOPS[where[0].type])


def _support_fields(support: Support) -> dict[str, Any]:
    return {
        "level": support.level,
        "reason": support.reason,
        "model_type": support.model_type,
        "num_layers": support.num_layers,
    }


def _show(name: str, rows: dict[str, Any]) -> None:
    table = Table(show_header=False, title=f"{name}: {rows['level']}", title_justify="left")
    for key, value in rows.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        table.add_row(key.replace("_", " "), f"{value:,}" if whole else str(value))
    tables().print(table)
