"""What rows cost on a model: one learned object each, kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from threading import Lock
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from lazyahead.draft.learned_cost import LearnedRowCost, prior_for
from lazyahead.folders import cache_folder
from lazyahead.hf.attach import dtype_name
from lazyahead.hf.native import native
from lazyahead.hf.ranks import num_ranks
from lazyahead.hf.triton_loops import triton_loops

_LEARNED: WeakKeyDictionary[PreTrainedModel, dict[str, LearnedRowCost]] = WeakKeyDictionary()
_LOCK = Lock()


def row_cost_of(model: PreTrainedModel) -> LearnedRowCost:
    """What is known of this model on its device and in its dtype, the same for every engine on it.

    Reads the cache file where there is one; nothing is run on the model.
    """
    key = _key(model)
    with _LOCK:
        known = _LEARNED.setdefault(model, {})
        if key not in known:
            prior = prior_for(model.device.type, dtype_name(model))
            known[key] = LearnedRowCost.load(cache_folder() / "row_cost" / f"{key}.json", prior)
        return known[key]


def clock_of(model: PreTrainedModel) -> Callable[[], float]:
    """What passes are timed by. On a CPU the thread's own time, since other processes are no part
    of what rows cost; between ranks the wall clock, since waiting for the others is."""
    own = model.device.type == "cpu" and num_ranks(model) == 1
    return time.thread_time if own else time.perf_counter


def _key(model: PreTrainedModel) -> str:
    """Of all that changes what a row costs: the model's shape, its device and dtype, and torch."""
    config = {
        name: value
        for name, value in model.config.to_dict().items()
        if isinstance(value, int | str | float)
    }
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    device = model.device
    is_cuda = device.type == "cuda"
    threads = torch.get_num_threads()
    hardware = torch.cuda.get_device_name(device) if is_cuda else f"{device.type}-{threads}"
    ranks = num_ranks(model)
    if ranks > 1:
        hardware += f"-tp{ranks}"
    weight = next(model.parameters())
    if (triton_loops(weight) if is_cuda else native(model.dtype)) is not None:
        hardware += "-linear loops"
    parts = [config, dtype_name(model), hardware, torch.__version__, "cpu time"]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
