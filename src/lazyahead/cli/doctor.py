"""`lazyahead doctor`: what works here, for this model, and why not more."""

from __future__ import annotations

import psutil
from rich.console import Console
from rich.table import Table

from lazyahead.cli import options
from lazyahead.cli.output import print_json, record


def doctor(
    model: options.Model = None, dtype: options.Dtype = None, device: options.Device = None, json: options.Json = False
) -> None:
    """Says what is supported for a model: full, decode-only or none, and why."""
    llm = options.Loading(model, dtype, device).load()
    support = llm.support
    free = psutil.virtual_memory().available
    fields = {
        "level": support.level,
        "reason": support.reason,
        "model_type": support.model_type,
        "num_layers": support.num_layers,
        "num_parameters": sum(parameter.numel() for parameter in llm.model.parameters()),
        "max_context": llm.max_context,
        "chat_template": bool(llm.tokenizer is not None and llm.tokenizer.chat_template),
        "free_memory_gb": round(free / 2**30, 1),
    }
    values = record(llm, seed=None, runs=0, results=fields)
    if json:
        print_json(values)
        return
    table = Table(show_header=False, title=f"{llm.name}: {support.level}", title_justify="left")
    rows = {**{name: value for name, value in fields.items() if name != "level"}, **values["machine"]}
    for name, value in rows.items():
        table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    Console(highlight=False).print(table)
