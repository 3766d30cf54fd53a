"""What a measurement was taken on. A number without it means nothing."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TypedDict

import torch


class Machine(TypedDict):
    """Recorded with every measurement."""

    cpu: str
    cores: int
    threads: int
    device: str
    dtype: str
    python: str
    torch: str
    transformers: str


def machine(device: torch.device, dtype: torch.dtype | str) -> Machine:
    """This machine, as the model on `device` sees it."""
    return Machine(
        cpu=cpu_name(),
        cores=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        dtype=str(dtype).removeprefix("torch."),
        python=platform.python_version(),
        torch=version("torch"),
        transformers=version("transformers"),
    )


def cpu_name() -> str:
    """The processor's model name, where the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
