"""The prefill strategy: the whole of its settings, frozen, validated, printable."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from lazyahead.checks import check_count, is_number
from lazyahead.errors import ConfigError
from lazyahead.prefill.schedule import Schedule
from lazyahead.prefill.score import (
    LastToken,
    Random,
    Scorer,
    scorer_from_dict,
    scorer_to_dict,
)

Revival = Literal["demand", "percentile", "never"]
_OLD_FIELDS = ("near", "doubt_below")
"""Fields that only profiles of version 0.1 have."""
_COUNTS = (
    "revive_limit",
    "local_window",
    "local_full_rows",
    "protect_first",
    "protect_last",
    "min_tokens",
)


@dataclass(frozen=True)
class LazyPrefill:
    """How a prompt is read (LazyLLM, arXiv 2407.14057). `None` in its place reads everything.

    Raises ConfigError for a setting that cannot mean anything, naming the value.
    """

    schedule: Schedule = ((0.9, 0.5),)
    """(depth, keep ratio) pairs: after this fraction of the layers, at most this fraction of the
    prompt's tokens goes on; the others are stashed."""
    scorer: Scorer = field(default_factory=LastToken)
    """Which tokens matter. The paper's is `LastToken()`."""
    revive: Revival = "demand"
    """`demand`: a stashed token is revived when a row's attention to it exceeds the threshold.
    `percentile`: the paper's rule, the best `keep_ratio` of the prompt are selected anew at every
    step. `never`: stashed tokens stay out."""
    revive_threshold: float = 0.2
    """Demand: attention of one head, of a running row to a stashed token, that revives it."""
    revive_limit: int = 8
    """Demand: most tokens that one row revives at a boundary, best first."""
    local_window: int = 1536
    """Tokens that a prompt row attends to in the local layers, besides the first four of the text.
    0: every row attends to everything in every layer. In half precision on a GPU, prompts of less
    than 16,384 tokens attend to everything too: a window saves nothing there."""
    local_from: float = 0.34
    """Depth of the first local layer; the last is the one below the first cut."""
    local_full_rows: int = 64
    """Last rows of the prompt that attend to everything in the local layers too."""
    protect_first: int = 4
    """Prompt tokens at the start that always go on."""
    protect_last: int = 64
    """Prompt tokens at the end that always go on (the last one always does)."""
    protect_question: bool = True
    """Whether the question always goes on, where the caller says where it is."""
    min_tokens: int = 256
    """Shorter prompts gain nothing and are read whole."""

    def __post_init__(self) -> None:
        _check_schedule(self.schedule, needs_attention=self.scorer.window_size > 0)
        if self.revive not in get_args(Revival):
            raise ConfigError(
                f"revive must be one of {', '.join(get_args(Revival))}, got {self.revive!r}"
            )
        if self.revive != "never" and self.scorer.window_size == 0:
            raise ConfigError(
                f"revive {self.revive!r} needs attention and {self.scorer} sees none; use 'never'"
            )
        for name in ("revive_threshold", "local_from"):
            value = getattr(self, name)
            if not (is_number(value) and 0 <= value <= 1):
                raise ConfigError(f"{name} must be in 0..1, got {value!r}")
        for name in _COUNTS:
            check_count(name, getattr(self, name))

    @property
    def num_last_rows(self) -> int:
        """Rows at the prompt's end that attend to everything in every layer."""
        return max(self.local_full_rows, self.protect_last, self.scorer.window_size)

    @classmethod
    def paper(cls) -> LazyPrefill:
        """The paper to the letter: last token, one layer, no protection, percentile selection at
        every step.

        Figure 4's sketch: 30 % dropped after 30, 60 and 90 % of the layers.
        """
        schedule = ((0.3, 0.7), (0.6, 0.49), (0.9, 0.343))
        return cls(
            schedule,
            scorer=LastToken(),
            local_window=0,
            revive="percentile",
            revive_threshold=0.0,
            revive_limit=0,
            protect_first=0,
            protect_last=0,
            protect_question=False,
            min_tokens=0,
        )

    @classmethod
    def random_drop(cls, keep_ratio: float = 0.5, seed: int = 0) -> LazyPrefill:
        """The paper's baseline: tokens dropped at random before the first layer, for good."""
        return cls._dropped(((0.0, keep_ratio),), Random(seed))

    @classmethod
    def static_prune(cls, keep_ratio: float = 0.5, depth: float = 0.25) -> LazyPrefill:
        """The paper's baseline: pruned once, by the attention of the first layers, for good."""
        return cls._dropped(((depth, keep_ratio),), LastToken())

    @classmethod
    def _dropped(cls, schedule: Schedule, scorer: Scorer) -> LazyPrefill:
        return cls(schedule, scorer=scorer, local_window=0, revive="never")

    @classmethod
    def preset(cls, name: str) -> LazyPrefill:
        """A named trade-off, see `PRESETS`. Raises ConfigError for an unknown name."""
        if name not in PRESETS:
            raise ConfigError(f"no preset is called {name!r}; there are {', '.join(PRESETS)}")
        return PRESETS[name]

    @classmethod
    def load(cls, path: str | Path) -> LazyPrefill:
        """Reads a profile that `save` wrote. Raises ConfigError for anything else."""
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"no profile at {path}; presets are {', '.join(PRESETS)}") from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path} is not a profile: {error}") from None
        return cls.from_dict(values.get("prefill", values))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LazyPrefill:
        """The inverse of `to_dict`. Raises ConfigError naming a field that does not exist."""
        values = dict(values)
        old = sorted(values.keys() & set(_OLD_FIELDS))
        if old:
            raise ConfigError(
                f"this profile was written by version 0.1 (it has {old[0]!r}); "
                "write a new one with `lazyahead tune` or LazyPrefill.save"
            )
        scorer = scorer_from_dict(values.pop("scorer", {"name": "window"}))
        unknown = sorted(values.keys() - cls.__dataclass_fields__.keys())
        if unknown:
            known = ", ".join(cls.__dataclass_fields__)
            raise ConfigError(
                f"not a LazyPrefill profile: there is no {unknown[0]!r}; there are {known}"
            )
        try:
            schedule = tuple(
                (float(depth), float(ratio)) for depth, ratio in values.pop("schedule")
            )
            return cls(schedule=schedule, scorer=scorer, **values)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not a LazyPrefill profile: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as benchmarks record them."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        schedule = [list(pair) for pair in self.schedule]
        return {**values, "schedule": schedule, "scorer": scorer_to_dict(self.scorer)}

    def save(self, path: str | Path) -> None:
        """Writes a profile (TOML) that `load` and `--prefill` take."""
        lines = ["[prefill]"]
        for name, value in self.to_dict().items():
            text = (
                "{ " + ", ".join(f"{k} = {json.dumps(v)}" for k, v in value.items()) + " }"
                if isinstance(value, dict)
                else json.dumps(value)
            )
            lines.append(f"{name} = {text}")
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _check_schedule(schedule: Schedule, needs_attention: bool) -> None:
    if not schedule:
        raise ConfigError("schedule is empty; pass prefill=None to read the whole prompt")
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in schedule):
        raise ConfigError(f"schedule must hold (depth, keep ratio) pairs, got {schedule!r}")
    last_depth, last_ratio = -1.0, 1.0
    for depth, ratio in schedule:
        if not (is_number(depth) and 0 <= depth < 1):
            raise ConfigError(f"depth must be in 0..1 (a fraction of the layers), got {depth}")
        if depth == 0 and needs_attention:
            raise ConfigError(
                "depth 0 lies before the first attention, so nothing can be scored there; "
                "use 0.05 or more"
            )
        if not (is_number(ratio) and 0 < ratio <= 1):
            raise ConfigError(f"keep ratio must be above 0 and at most 1, got {ratio}")
        if depth <= last_depth:
            raise ConfigError(f"depths must rise, got {depth} after {last_depth}")
        if ratio > last_ratio:
            raise ConfigError(
                f"keep ratios must not grow with depth, got {ratio} after {last_ratio}"
            )
        last_depth, last_ratio = depth, ratio


PRESETS: dict[str, LazyPrefill] = {
    "balanced": LazyPrefill(),
    "fast": LazyPrefill(((0.85, 0.2),), local_window=1024),
    "paper": LazyPrefill.paper(),
    "static_prune": LazyPrefill.static_prune(),
    "random_drop": LazyPrefill.random_drop(),
}
"""Named trade-offs. The last two are the paper's baselines, for benchmarks."""
