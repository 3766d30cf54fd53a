"""Measures what passes cost on one model and machine, for `scripts/scale_simulation.py`:

python scripts/scale_costs.py MODEL [--dtype bfloat16] [--threads 1] > costs.json
"""

from __future__ import annotations

import argparse
import json
import random
from statistics import median
from typing import Any

import torch

from lazyahead import LLM, LazyPrefill, Sampling
from lazyahead.bench.machine import machine

LENGTHS = (1000, 2000, 4000)
NUM_QUESTION = 32
NUM_ANSWER = 17
RUNS = 3


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
    cold = llm.generate(some(length), session=session, sampling=sampling).stats
    document_bytes = session.nbytes
    question = [*session.history, *some(NUM_QUESTION)]
    warm = llm.generate(question, session=session, sampling=sampling).stats
    return {
        "cold_s": cold.ttft_s,
        "question_s": warm.ttft_s,
        "step_s": warm.decode_s / warm.num_steps,
        "session_bytes": document_bytes,
    }


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(json.dumps(measure(given.model, given.dtype), indent=1))


if __name__ == "__main__":
    main()
