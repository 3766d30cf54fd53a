"""Time to first token and time per further token of several engines on one model and one text.

Engines take turns, so that a machine that slows down slows all of them; of each the fastest run
counts. What is not installed, or has no model of its own, is left out with a line. The last line
of stdout is one JSON object.

    scripts/compare_engines --model models/smollm2-135m-instruct --openvino FOLDER --gguf FILE
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import PreTrainedModel

from lazyahead import LLM
from lazyahead.bench.machine import machine
from lazyahead.sampling import Sampling

Tokens = Callable[[list[int], int], Iterator[object]]
"""Yields as a text of token ids is answered, once a token."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Row:
    """One engine at one length."""

    engine: str
    length: int
    """Prompt tokens."""
    ttft_s: float
    step_s: float
    """Mean of the further tokens."""
    ttft_ratio: float
    """Over that of transformers; below 1 is faster."""
    step_ratio: float


def transformers_tokens(model: PreTrainedModel) -> Tokens:
    @torch.no_grad()
    def answer(ids: list[int], num_steps: int) -> Iterator[object]:
        out = model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
        yield out
        for _ in range(num_steps):
            last = out.logits[:, -1:].argmax(-1)
            out = model(last, past_key_values=out.past_key_values, use_cache=True)
            yield out

    return answer


def our_tokens(model: PreTrainedModel, prefill: str) -> Tokens:
    llm = LLM(model, prefill=prefill, decode=None)

    def answer(ids: list[int], num_steps: int) -> Iterator[object]:
        sampling = Sampling(max_new_tokens=num_steps + 1, ignore_eos=True)
        return iter(llm.stream(ids, sampling=sampling))

    return answer


def openvino_tokens(folder: str, threads: int, clock: str) -> Tokens:
    """A model exported by `optimum-cli export openvino`."""
    import openvino as ov
    import openvino_genai

    pipe = openvino_genai.LLMPipeline(folder, "CPU", INFERENCE_NUM_THREADS=threads)
    now = CLOCKS[clock]

    class Watch(openvino_genai.StreamerBase):  # type: ignore[misc]
        """Notes when each token comes."""

        def __init__(self) -> None:
            super().__init__()
            self.times: list[float] = []

        def write(self, tokens: int | list[int]) -> Any:
            self.times += [now()] * (1 if isinstance(tokens, int) else len(tokens))
            return openvino_genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    def answer(ids: list[int], num_steps: int) -> Iterator[object]:
        """Whole at once, timed by the tokens that it has streamed."""
        given = torch.tensor([ids])
        inputs = openvino_genai.TokenizedInputs(
            ov.Tensor(given.numpy()), ov.Tensor(torch.ones_like(given).numpy())
        )
        options = {"max_new_tokens": num_steps + 1, "ignore_eos": True, "do_sample": False}
        watch, start = Watch(), now()
        pipe.generate(inputs, streamer=watch, **options)
        first, last = watch.times[0], watch.times[-1]
        yield first - start, (last - first) / max(1, len(watch.times) - 1)

    return answer


def llama_cpp_tokens(file: str, threads: int, longest: int) -> Tokens:
    import llama_cpp

    llama = llama_cpp.Llama(
        file, n_ctx=longest, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def answer(ids: list[int], num_steps: int) -> Iterator[object]:
        llama.reset()
        tokens = llama.generate(ids, temp=0.0)
        return (next(tokens) for _ in range(num_steps + 1))

    return answer


def time_of(answer: Tokens, ids: list[int], num_steps: int, clock: str) -> tuple[float, float]:
    """Seconds to the first token, and mean seconds of each further one."""
    now = CLOCKS[clock]
    start = now()
    tokens = answer(ids, num_steps)
    first = next(tokens)
    if isinstance(first, tuple):  # the engine has measured itself
        return first
    read = now()
    count = sum(1 for _ in tokens)
    return read - start, (now() - read) / max(1, count)


def engines(given: argparse.Namespace, llm: LLM) -> dict[str, Tokens]:
    """Those that are installed. Tells what is left out."""
    found = {"transformers": transformers_tokens(llm.model)}
    models = {"": llm.model}
    if given.int8:
        models[" int8"] = LLM(given.model, dtype="int8", device="cpu", prefill=None).model
    for kind, model in models.items():
        for prefill in ("off", "balanced"):
            found[f"lazyahead{kind}, prefill {prefill}"] = our_tokens(model, prefill)
    others: dict[str, Callable[[], Tokens]] = {
        f"OpenVINO GenAI, {Path(folder).name}": partial(
            openvino_tokens, folder, given.threads, given.clock
        )
        for folder in given.openvino
    }
    for file in given.gguf:
        longest = max(given.lengths) + 64
        others[f"llama.cpp, {Path(file).name}"] = partial(
            llama_cpp_tokens, file, given.threads, longest
        )
    for name, option in (("OpenVINO GenAI", given.openvino), ("llama.cpp", given.gguf)):
        if not option:
            print(f"{name} is left out: give its model (--openvino FOLDER, --gguf FILE)")
    for name, make in others.items():
        try:
            found[name] = make()
        except ImportError as error:
            print(f"{name} is left out: {error}")
    return found


def document(tokenizer: Any, length: int) -> list[int]:
    """So many tokens of Python's language reference, repeated where it is shorter."""
    ids = list(tokenizer("\n".join(topics.values()))["input_ids"])
    return (ids * (1 + length // len(ids)))[:length]


def measure(found: dict[str, Tokens], ids: list[int], given: argparse.Namespace) -> Iterator[Row]:
    """Each engine's fastest times, in turns. No two rounds begin alike, so that no engine finds
    the text in a cache of its own."""
    best = dict.fromkeys(found, (float("inf"), float("inf")))
    for run in range(given.runs):
        text = ids[run:] + ids[:run]
        for name, answer in found.items():
            times = time_of(answer, text, given.steps, given.clock)
            best[name] = min(best[name][0], times[0]), min(best[name][1], times[1])
    ttft, step = best["transformers"]
    for name, (own_ttft, own_step) in best.items():
        yield Row(name, len(ids), own_ttft, own_step, own_ttft / ttft, own_step / step)


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--int8", action="store_true", help="ours in 8-bit integers too")
    parser.add_argument(
        "--openvino", nargs="+", default=[], help="the same model, exported for OpenVINO"
    )
    parser.add_argument("--gguf", nargs="+", default=[], help="the same model for llama.cpp")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 3500])
    parser.add_argument("--steps", type=int, default=15, help="tokens after the first")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu counts this process only: busy machines",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    given = arguments(argv)
    torch.set_num_threads(given.threads)
    llm = LLM(given.model, dtype=given.dtype, device="cpu", prefill=None)
    found = engines(given, llm)
    rows = []
    for length in given.lengths:
        for row in measure(found, document(llm.tokenizer, length), given):
            rows.append(row)
            print(
                f"{row.length:6,} {row.engine:32} first token {row.ttft_s:7.3f} s "
                f"({row.ttft_ratio:.2f}), each further {row.step_s * 1e3:6.1f} ms "
                f"({row.step_ratio:.2f})",
                flush=True,
            )
    record = {
        "lazyahead": version("lazyahead"),
        "machine": machine(llm.model.device, llm.model.dtype),
        "model": llm.name,
        "config": {name: value for name, value in vars(given).items() if name != "runs"},
        "seed": None,
        "runs": given.runs,
        "rows": [asdict(row) for row in rows],
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main(sys.argv[1:])
