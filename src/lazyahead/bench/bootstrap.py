"""Confidence intervals by resampling: how far a result moves with other samples of the kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 2000
LEVEL = 0.95


class Interval(NamedTuple):
    """A value and the bounds that hold it with a probability of `LEVEL`."""

    value: float
    low: float
    high: float


def mean_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Of the mean. Raises ValueError without values."""
    return ratio_interval(values, [1.0] * len(values), seed)


def ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float], seed: int = 0
) -> Interval:
    """Of sum(numerators) / sum(denominators), both summed over the same resampled samples.

    Paired: a sample brings both its terms. Denominators are positive, so every resample has a
    ratio. Raises ValueError without samples, for lengths that differ and for a denominator that
    is not positive.
    """
    if not numerators or len(numerators) != len(denominators):
        raise ValueError(f"pairs needed, got {len(numerators)} and {len(denominators)} terms")
    top, bottom = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    if not (bottom > 0).all():
        raise ValueError(f"denominators must be positive, got {bottom.min()}")
    drawn = _draws(len(top), seed)
    ratios = top[drawn].sum(1) / bottom[drawn].sum(1)
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(top.sum() / bottom.sum()), float(low), float(high))


def _draws(num_samples: int, seed: int) -> NDArray[np.int64]:
    """(NUM_RESAMPLES, num_samples) indices drawn with replacement."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, num_samples, (NUM_RESAMPLES, num_samples))
