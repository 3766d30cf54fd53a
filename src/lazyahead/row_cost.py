"""What a decoding step costs by its number of rows: measured once per model, device and dtype, then remembered."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lazyahead.draft.budget import RowCost
from lazyahead.errors import ConfigError
from lazyahead.prefill.boundary import Flight
from lazyahead.runner import Runner
from lazyahead.session import Session

ROWS = (1, 2, 4, 8, 16, 32, 64)
_CONTEXT = 128
_SECONDS = 1.0
"""How long the measurement goes on; every row count is timed twice at least, on however slow a machine."""


def row_cost_of(model: PreTrainedModel, runner: Runner) -> RowCost:
    """The curve of this model here, from the cache file where it is known, else measured (about a second)."""
    path = cache_folder() / "row_cost" / f"{_key(model, runner.device)}.json"
    try:
        return RowCost.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ConfigError):
        pass
    cost = measure(runner)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(cost.to_json(), encoding="utf-8")
        part.replace(path)
    except OSError:
        pass  # a read-only home: measured again next time
    return cost


def measure(runner: Runner) -> RowCost:
    """Seconds of passes of 1 to 64 rows over 128 tokens of context, the best of many each: noise only adds."""
    session = Session(runner.num_layers)
    best = dict.fromkeys(ROWS, float("inf"))
    with runner.attached():
        runner.run([Flight(session, None, [1] * _CONTEXT, runner.device)])
        session.commit([1] * _CONTEXT, 0, [])
        end = time.perf_counter() + _SECONDS
        rounds = 0
        while rounds < 2 or time.perf_counter() < end:
            for rows in ROWS:
                best[rows] = min(best[rows], _time_step(runner, session, rows))
            rounds += 1
    return RowCost(list(best.items()))


def cache_folder() -> Path:
    """Where measurements are kept: `LAZYAHEAD_CACHE`, else lazyahead in the user's cache folder."""
    named = os.environ.get("LAZYAHEAD_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lazyahead"


def _time_step(runner: Runner, session: Session, rows: int) -> float:
    """A chain of drafts under one root, taken back afterwards."""
    num_drafts = rows - 1
    ancestors = torch.ones(num_drafts, num_drafts, dtype=torch.bool, device=runner.device).tril()
    depths = range(1, rows)
    flight = Flight(session, None, [1] * rows, runner.device, depths=depths, ancestors=ancestors)
    start = time.perf_counter()
    logits = runner.run([flight])
    logits.argmax(-1).tolist()  # waits for the device, as a step does
    seconds = time.perf_counter() - start
    for kv in session.kv:
        kv.commit(rows, None)
    return seconds


def _key(model: PreTrainedModel, device: torch.device) -> str:
    """Model shape, device, dtype and torch: all that moves the curve."""
    config = {name: value for name, value in model.config.to_dict().items() if isinstance(value, int | str | float)}
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu-{torch.get_num_threads()}"
    parts = [config, str(model.dtype), hardware, torch.__version__]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
