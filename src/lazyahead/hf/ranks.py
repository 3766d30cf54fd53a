"""Tensor parallelism as the model sees it: each process (a rank) holds a share of the weights and
of the attention heads of every layer, by transformers' own plan for the family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lazyahead.errors import UnsupportedModelError


def num_ranks(model: nn.Module) -> int:
    """Processes that hold a share of the model; 1 where it is whole."""
    if getattr(model, "_device_mesh", None) is None:
        return 1
    config = getattr(model.config, "distributed_config", None)
    return int(getattr(config, "tp_size", None) or getattr(model, "_tp_size", None) or 1)


def over_ranks(part: Tensor, how: str) -> Tensor:
    """`sum` or `max` of what the ranks hold, the same on all of them."""
    dist.all_reduce(part, dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM)
    return part


def whole(weight: Tensor) -> Tensor:
    """A weight of which each rank holds a share, put together: all ranks must ask."""
    gather = getattr(weight, "full_tensor", None)
    return weight if gather is None else gather()


def load_options(config: Any, num: int, name: str) -> dict[str, Any]:
    """What `from_pretrained` takes to give each of `num` ranks its share.

    Raises UnsupportedModelError for a family without a plan, and for heads that cannot be shared
    out evenly.
    """
    if num == 1:
        return {}
    text = config.get_text_config()
    plan: Mapping[str, str] = getattr(text, "base_model_tp_plan", None) or {}
    if not plan:
        raise UnsupportedModelError(
            f"{name} ({config.model_type}) has no tensor-parallel plan in transformers; load it "
            "without tp"
        )
    shares_heads = any(key.endswith("k_proj") and how == "colwise" for key, how in plan.items())
    for field in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, field, None)
        if shares_heads and isinstance(heads, int) and heads % num:
            raise UnsupportedModelError(
                f"{name} has {field} {heads}, which tp={num} ranks cannot share evenly; choose a "
                f"divisor of {heads}"
            )
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_size=num)}


def accelerator() -> str:
    """The kind of device that ranks use: `cuda`, or `cpu` where there is no other."""
    return "cuda" if torch.cuda.is_available() else "cpu"
