"""What `lazyahead bench serve` prints and writes."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from lazyahead.cli.output import check_folders, envelope, tables, whole_file
from lazyahead.errors import ConfigError

if TYPE_CHECKING:
    from lazyahead.bench.serve import Load, Run

TITLES = {
    "ttft": "time to the first token",
    "tpot": "time per output token after the first",
    "itl": "between tokens",
    "e2el": "to the end of the answer",
}
COUNTS = (
    ("completed", "requests answered", ",.0f"),
    ("failed", "requests failed", ",.0f"),
    ("duration", "seconds", ",.2f"),
    ("total_input_tokens", "prompt tokens", ",.0f"),
    ("total_cached_tokens", "of them from a cache", ",.0f"),
    ("total_output_tokens", "answer tokens", ",.0f"),
    ("request_throughput", "requests a second", ",.3f"),
    ("request_goodput", "good ones a second", ",.3f"),
    ("output_throughput", "answer tokens a second", ",.1f"),
    ("total_token_throughput", "tokens a second", ",.1f"),
    ("max_concurrent_requests", "most at once", ",.0f"),
    ("spec_decode_acceptance_rate", "drafted tokens accepted, %", ",.1f"),
    ("spec_decode_acceptance_length", "tokens per drafted pass", ",.2f"),
)


@dataclass(frozen=True)
class ResultFile:
    """Where the result goes besides stdout. Raises ConfigError, RequestError."""

    is_wanted: bool
    folder: Path | None = None
    name: str | None = None
    date: str = field(default_factory=lambda: datetime.now().strftime("%Y%m%d-%H%M%S"))

    def __post_init__(self) -> None:
        for option, value in (("--result-dir", self.folder), ("--result-filename", self.name)):
            if value is not None and not self.is_wanted:
                raise ConfigError(f"{option} {value} goes with --save-result; give both")
        if self.is_wanted:
            check_folders((self.folder or Path()) / (self.name or "result.json"))

    def write(self, result: dict[str, Any]) -> None:
        """Named as vLLM does, where no name was given."""
        if not self.is_wanted:
            return
        at_once = result["max_concurrency"]
        concurrency = "" if at_once is None else f"-concurrency{at_once}"
        rate, model = result["request_rate"], result["model_id"].rsplit("/", 1)[-1]
        own = f"{result['backend']}-{rate}qps{concurrency}-{model}-{self.date}.json"
        with whole_file((self.folder or Path()) / (self.name or own)) as path:
            path.write_text(json.dumps(result) + "\n", encoding="utf-8")


def figures_of(run: Run, with_details: bool, wanted: dict[str, Any]) -> dict[str, Any]:
    """The figures of a run."""
    from lazyahead.bench.serve_metrics import detailed, figures

    found = figures(run.outcomes, run.duration, **wanted) | run.spec_decode
    return found | (detailed(run.outcomes, run.begin) if with_details else {})


def describe(
    load: Load, run: Run, figures: dict[str, Any], wanted: dict[str, Any]
) -> dict[str, Any]:
    """One JSON object: what all commands tell, what vLLM tells of the load, the figures. The
    machine is the one that sent the requests."""
    import torch

    rate = "inf" if math.isinf(load.request_rate) else load.request_rate
    even = "inf" if math.isinf(load.burstiness) else load.burstiness
    asked: dict[str, Any] = asdict(load)
    asked |= {"headers": sorted(load.headers), "data": load.data and load.data.name}
    asked |= {"request_rate": rate, "burstiness": even, "refused_fields": run.target.refused}
    asked["random"] = None if load.data else asked["random"]
    asked |= {"left_out": run.left_out, **wanted}
    told = {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "backend": load.backend,
        "endpoint": run.target.path,
        "model_id": run.target.model,
        "tokenizer_id": load.tokenizer,
        "num_prompts": len(run.outcomes),
        "request_rate": rate,
        "burstiness": even,
        "max_concurrency": load.max_concurrency,
    }
    where = (torch.device("cpu"), torch.get_default_dtype())
    return envelope(run.target.model, where, asked, load.seed, 1, told | figures)


def show(load: Load, run: Run, figures: dict[str, Any]) -> None:
    """The figures as two tables."""
    console = tables()
    console.print(f"{run.target.model} at {load.base_url}", markup=False)
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, title, style in COUNTS:
        if figures.get(name) is not None:
            table.add_row(title, format(figures[name], style))
    console.print(table)
    columns = ["mean", "median", "std"]
    columns += sorted({name.split("_")[0] for name in figures if name.startswith("p")}, key=_rank)
    table = Table(title="Milliseconds", title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for name, title in TITLES.items():
        if f"mean_{name}_ms" not in figures:
            continue
        unit = "between chunks" if figures["itl_per"] == "chunk" else title
        values = [figures[f"{column}_{name}_ms"] for column in columns]
        shown = ["–" if value is None else f"{value:,.1f}" for value in values]
        table.add_row(unit if name == "itl" else title, *shown)
    console.print(table)


def _rank(name: str) -> float:
    """Of `p99`."""
    return float(name.removeprefix("p"))
