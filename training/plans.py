"""Training plans: stages from short and dense to long."""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stage:
    """A stretch of training: sequence length, sequences and number of steps, learning rate from
    start to end.

    `repeats` is the share of sequences of repeated random spans, `dense` the share of short pages
    with little filler.
    """

    length: int
    batch: int
    steps: int
    lr_start: float
    lr_end: float
    repeats: float = 0.0
    dense: float = 0.0


# Dense first, then filler and distractors, then length.
PLANS: dict[str, tuple[Stage, ...]] = {
    "small": (
        Stage(length=512, batch=4, steps=40, lr_start=0.0, lr_end=5e-4, dense=0.5),
        Stage(length=512, batch=4, steps=660, lr_start=5e-4, lr_end=5e-4, dense=0.5),
        Stage(length=1024, batch=2, steps=300, lr_start=5e-4, lr_end=5e-4, dense=0.3),
        Stage(length=2048, batch=1, steps=300, lr_start=5e-4, lr_end=4e-4, dense=0.1),
        Stage(length=4096, batch=1, steps=160, lr_start=4e-4, lr_end=2e-4),
        Stage(length=8192, batch=1, steps=40, lr_start=2e-4, lr_end=2e-5),
    ),
    "large": (
        Stage(length=512, batch=64, steps=60, lr_start=0.0, lr_end=8e-4, dense=0.5),
        Stage(length=512, batch=64, steps=1500, lr_start=8e-4, lr_end=8e-4, dense=0.5),
        Stage(length=2048, batch=16, steps=1500, lr_start=8e-4, lr_end=6e-4, dense=0.1),
        Stage(length=8192, batch=4, steps=1500, lr_start=6e-4, lr_end=3e-4),
        Stage(length=16384, batch=4, steps=500, lr_start=3e-4, lr_end=2e-5),
    ),
    # Goes on from finished weights.
    "more": (
        Stage(length=1024, batch=2, steps=20, lr_start=0.0, lr_end=4e-4, dense=0.3),
        Stage(length=1024, batch=2, steps=250, lr_start=4e-4, lr_end=4e-4, dense=0.3),
        Stage(length=2048, batch=1, steps=450, lr_start=4e-4, lr_end=4e-4, dense=0.1),
        Stage(length=4096, batch=1, steps=320, lr_start=4e-4, lr_end=2.5e-4),
        Stage(length=8192, batch=1, steps=110, lr_start=2.5e-4, lr_end=5e-6),
    ),
}


def load_plan(name: str) -> tuple[Stage, ...]:
    """A plan by name, or from a JSON file with a list of Stage fields. Raises ValueError where
    `name` is neither."""
    if name in PLANS:
        return PLANS[name]
    if not Path(name).is_file():
        raise ValueError(f"no plan {name!r}: name one of {', '.join(PLANS)}, or a JSON file")
    return tuple(Stage(**stage) for stage in json.loads(Path(name).read_text()))
