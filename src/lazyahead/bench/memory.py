"""Peak memory of one prefill: from a GPU's allocator, or sampled in a fresh process on a CPU."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from typing import NamedTuple

import psutil
import torch

SAMPLE_EVERY_S = 0.002


class Peak(NamedTuple):
    """Bytes in use at most, weights included, and before the prefill began."""

    peak: int
    before: int

    @property
    def working(self) -> int:
        """What the prefill itself needed on top: keys, values, stash and scratch."""
        return max(1, self.peak - self.before)


@contextmanager
def watched(device: torch.device) -> Iterator[list[Peak]]:
    """Puts the peak of what runs inside into the list."""
    peaks: list[Peak] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peaks
        peaks.append(Peak(torch.cuda.max_memory_allocated(device), before))
        return
    process = psutil.Process(os.getpid())
    seen: list[int] = []
    done = threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_EVERY_S):
            seen.append(process.memory_info().rss)

    before = process.memory_info().rss
    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()
    peaks.append(Peak(max([before, *seen]), before))


def give_back() -> None:
    """Returns freed memory to the system, so that one measurement does not depend on another."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library keeps its own house
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def in_own_process(measure: Callable[..., list[Peak]], *arguments: object) -> list[Peak]:
    """Runs `measure` where nothing else has ever been allocated. Both must pickle."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def ratio(ours: Sequence[Peak], baseline: Sequence[Peak], index: int) -> tuple[float, float]:
    """Ours over baseline: all memory, and the part on top of the weights."""
    return ours[index].peak / baseline[index].peak, ours[index].working / baseline[index].working
