"""Rotary scaling of GGUF files, which transformers leaves out: Llama 3's is put back.

llama.cpp stores Llama 3's scaling as a tensor `rope_freqs.weight`, (head_dim / 2): what each
frequency is divided by.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

FACTORS = "rope_freqs.weight"
LOW, HIGH, ORIGINAL = 1.0, 4.0, 8192
"""Llama 3's bounds between the frequencies that are scaled and those that are not, and the context
it was trained with: the same in all its releases."""
TOLERANCE = 1e-3


def llama3_scaling(factors: NDArray[Any], theta: float) -> dict[str, Any] | None:
    """transformers' `rope_parameters` for the factors of a file; None where they are not Llama 3's.

    `factors` is (head_dim / 2), from the highest frequency to the lowest; `theta` the rotary base.
    """
    factor = float(factors[-1])
    if not np.allclose(factors, llama3_factors(len(factors), theta, factor), rtol=TOLERANCE):
        return None
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": LOW,
        "high_freq_factor": HIGH,
        "original_max_position_embeddings": ORIGINAL,
    }


def llama3_factors(num_frequencies: int, theta: float, factor: float) -> NDArray[np.float64]:
    """What Llama 3 divides each frequency by, (num_frequencies)."""
    wavelengths = 2 * math.pi * theta ** (np.arange(num_frequencies) / num_frequencies)
    share = np.clip((ORIGINAL / wavelengths - LOW) / (HIGH - LOW), 0, 1)
    return 1 / ((1 - share) / factor + share)
