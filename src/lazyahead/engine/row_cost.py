"""What a decoding step costs by its number of rows: measured once per model, device and dtype, then
remembered."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lazyahead.cache.session import Session
from lazyahead.draft.budget import RowCost
from lazyahead.engine.model_runner import Runner
from lazyahead.errors import ConfigError, OutOfMemoryError
from lazyahead.prefill.policy import Segment

ROWS = (1, 2, 4, 8, 16, 32, 64)
_CONTEXTS = (128, 2048)
"""Tokens of context behind which rows are timed; what lies between two lengths tells what a token
of context costs."""
_SECONDS = 1.5
"""How long the measurement goes on, twice as long in noise; every row count is timed twice at
least."""
_AGREES = 1.3
"""The second best time over the best, at most, where a point is sure."""


def row_cost_of(model: PreTrainedModel, runner: Runner, *, again: bool = False) -> RowCost:
    """The curve of this model here, from the cache file where it is known, else measured (about two
    seconds), as it is where it shall be `again`. What was measured in noise is not kept."""
    path = cache_folder() / "row_cost" / f"{_key(model, runner.device)}.json"
    try:
        if not again:
            return RowCost.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ConfigError):
        pass
    cost = measure(runner)
    if not cost.is_sure:
        return cost
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(cost.to_json(), encoding="utf-8")
        part.replace(path)
    except OSError:
        pass  # a read-only home: measured again next time
    return cost


def measure(runner: Runner) -> RowCost:
    """Seconds of passes of 1 to 64 rows, the best of many each (noise only adds), and what a token
    of context adds."""
    session = Session(runner.num_layers)
    short, long = _CONTEXTS
    with runner.attached():
        runner.run([Segment(session, None, [1] * short, runner.device)])
        session.commit([1] * short, 0, [])
        try:
            near, far = _best(runner, (session, _stretched(session, long)))
        except OutOfMemoryError:
            (near,) = _best(runner, (session,))
            return near
    gained = zip(near.points, far.points, strict=True)
    per_token = tuple(max(0.0, (b - a) / (long - short)) for (_, a), (_, b) in gained)
    return RowCost(near.points, per_token, near.is_sure and far.is_sure)


def _best(runner: Runner, sessions: Sequence[Session]) -> list[RowCost]:
    """Each session's curve, measured in turns."""
    times = [{rows: list[float]() for rows in ROWS} for _ in sessions]
    begin = time.perf_counter()
    rounds = 0
    while (
        rounds < 2
        or (taken := time.perf_counter() - begin) < _SECONDS
        or (taken < 2 * _SECONDS and _noisy(times))
    ):
        for rows in ROWS:
            for session, seconds in zip(sessions, times, strict=True):
                seconds[rows].append(_time_step(runner, session, rows))
        rounds += 1
    is_sure = not _noisy(times)
    return [
        RowCost([(rows, min(taken)) for rows, taken in one.items()], is_sure=is_sure)
        for one in times
    ]


def _noisy(times: Sequence[dict[int, list[float]]]) -> bool:
    """Whether any best time may be the noise's: none comes near it. Noise only adds, but it may add
    every time."""
    best_two = [sorted(taken)[:2] for one in times for taken in one.values()]
    return any(second > _AGREES * first for first, second in best_two)


def _stretched(session: Session, length: int) -> Session:
    """A session of `length` tokens that repeats what this one holds: no prompt is read for it."""
    longer = Session(session.num_layers)
    num = len(session)
    for start in range(0, length, num):
        for kv, more in zip(session.kv, longer.kv, strict=True):
            more.append(kv.keys, kv.values, kv.positions + start)
        longer.token_ids += session.token_ids
    return longer


def cache_folder() -> Path:
    """Where measurements are kept: `LAZYAHEAD_CACHE`, else lazyahead in the user's cache folder."""
    named = os.environ.get("LAZYAHEAD_CACHE")
    return (
        Path(named)
        if named
        else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lazyahead"
    )


def _time_step(runner: Runner, session: Session, rows: int) -> float:
    """A chain of drafts under one root, taken back afterwards."""
    num_drafts = rows - 1
    ancestors = torch.ones(num_drafts, num_drafts, dtype=torch.bool, device=runner.device).tril()
    depths = range(1, rows)
    segment = Segment(session, None, [1] * rows, runner.device, depths=depths, ancestors=ancestors)
    start = time.perf_counter()
    logits = runner.run([segment])
    logits.argmax(-1).tolist()  # waits for the device, as a step does
    seconds = time.perf_counter() - start
    for kv in session.kv:
        kv.commit(rows, None)
    return seconds


def _key(model: PreTrainedModel, device: torch.device) -> str:
    """Model shape, device, dtype, torch and how it is measured: all that moves the curve."""
    config = {
        name: value
        for name, value in model.config.to_dict().items()
        if isinstance(value, int | str | float)
    }
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    hardware = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu-{torch.get_num_threads()}"
    )
    parts = [config, str(model.dtype), hardware, torch.__version__, _CONTEXTS, _AGREES]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
