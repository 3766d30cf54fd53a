"""Measures what passes cost on one model and machine, for `scripts/scale_simulation.py`:

python scripts/scale_costs.py MODEL [--dtype bfloat16] > costs.json

One thread, in seconds of the processor: other work on the machine is not counted.
"""

from __future__ import annotations

import argparse
import json
import random
from statistics import median
from time import process_time
from typing import Any

import torch

from lazyahead import LLM, LazyPrefill, Sampling
from lazyahead.bench.machine import machine

LENGTHS = (1000, 2000, 4000)
NUM_QUESTION = 32
NUM_ANSWER = 9
RUNS = 2


def measure(model: str | None, dtype: str) -> dict[str, Any]:
    """Seconds of a whole document's reading, of a question behind it, and of a decode step; both
    ways of reading."""
    ways = {"full": None, "lazy": LazyPrefill()}
    found: dict[str, Any] = {}
    hardware: Any = None
    for way, prefill in ways.items():
        llm = LLM(model, dtype=dtype, prefill=prefill, decode=None)
        hardware = machine(llm.model.device, llm.model.dtype)
        _times(llm, 256)
        runs = [[_times(llm, length) for _ in range(RUNS)] for length in LENGTHS]
        found[way] = [
            {"length": length, **{name: median(run[name] for run in of) for name in of[0]}}
            for length, of in zip(LENGTHS, runs, strict=True)
        ]
    return {"machine": hardware, "model": llm.name, "dtype": dtype, **found}


def _times(llm: LLM, length: int) -> dict[str, float]:
    rng = random.Random(length)
    vocab_size = int(llm.model.config.get_text_config().vocab_size)

    def some(num: int) -> list[int]:
        return [rng.randrange(5, vocab_size - 5) for _ in range(num)]

    session, sampling = llm.session(), Sampling(max_new_tokens=NUM_ANSWER, ignore_eos=True)

    def timed(prompt: list[int]) -> tuple[float, float]:
        begin = process_time()
        pieces = llm.stream(prompt, session=session, sampling=sampling)
        next(pieces)
        first = process_time()
        last = list(pieces)[-1]
        return first - begin, (process_time() - first) / last.stats.num_steps

    cold, _ = timed(some(length))
    document_bytes = session.nbytes
    question, step = timed([*session.history, *some(NUM_QUESTION)])
    return {
        "cold_s": cold,
        "question_s": question,
        "step_s": step,
        "session_bytes": document_bytes,
    }


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--dtype", default="bfloat16")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(measure(given.model, given.dtype), indent=1))


if __name__ == "__main__":
    main()
