"""One pass through the model: packed rows in, logits of the rows that speak out.

The model runs its own forward. We stand at three public seams: the attention function (keys and
values are ours), a pre-hook on each decoder layer (rows leave and join at boundaries), and a
pre-hook on the head (only some rows speak). Nothing stays attached outside `with
runner.attached()`, and outside `runner.run` attention is the model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from lazyahead.errors import LazyAheadError, OutOfMemoryError
from lazyahead.hf.attention import Heads
from lazyahead.hf.model_spec import ModelSpec
from lazyahead.hf.segment import Pass, Segment
from lazyahead.hf.trace import switched

ATTENTION = "lazyahead"
"""The name under which the attention function is registered."""


class _AllDeferred(Exception):  # noqa: N818 (a way out, no error)
    """No rows are left in segment: the rest of the model has nothing to do."""


_current: ContextVar[Pass | None] = ContextVar("lazyahead_pass", default=None)


class Runner:
    """Owns the seams of one model."""

    def __init__(self, model: PreTrainedModel, spec: ModelSpec) -> None:
        self.model, self.spec = model, spec
        self.on_layer: Any = None
        """Called with the layer about to run, for progress; None: nobody asks."""
        self._depth = 0
        self._hooks = ExitStack()

    @property
    def num_layers(self) -> int:
        return self.spec.num_layers

    @property
    def attends_fully(self) -> tuple[bool, ...]:
        return self.spec.attends_fully

    @property
    def device(self) -> torch.device:
        return self.spec.device

    @property
    def single_request_only(self) -> bool:
        """Rotary tables depend on the longest position in a pass, so requests must not share one,
        nor be split."""
        return self.spec.rope is not None

    def may_draft(self, start: int, end: int) -> bool:
        """Whether drafts up to position `end` leave the tables of the root at `start` as they are
        without drafts."""
        return self.spec.rope is None or self.spec.rope.is_steady(start, end)

    @contextmanager
    def attached(self) -> Iterator[Runner]:
        """Hooks live in here, also when nested, and are gone after, also after an exception."""
        if self._depth == 0:
            self._attach()
        self._depth += 1
        try:
            yield self
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._hooks.close()

    @torch.no_grad()
    def run(self, segments: Sequence[Segment]) -> Tensor:
        """Logits (R, V) of all rows that speak, segments in order. Raises OutOfMemoryError when the
        device is full."""
        if self._depth == 0:
            raise LazyAheadError("the model is not attached; run inside `with runner.attached()`")
        device = self.spec.device
        ids = [token for segment in segments for token in segment.token_ids]
        positions = torch.cat([segment.entering_positions for segment in segments])
        self._speak = self._logits_indices(segments)
        token = _current.set(Pass(segments, self.spec))
        try:
            with switched(self.spec.configs, ATTENTION), self._as_new():
                output = self.model(
                    input_ids=torch.tensor([ids], device=device),
                    position_ids=positions[None],
                    use_cache=False,
                    return_dict=True,
                )
            logits: Tensor = output.logits[0]
            return logits
        except _AllDeferred:
            return torch.empty(0, 0, device=device)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"no memory left on {device} for {len(ids)} rows; shorten the prompt"
            ) from error
        finally:
            _current.reset(token)

    def _as_new(self) -> AbstractContextManager[None]:
        return nullcontext() if self.spec.rope is None else self.spec.rope.as_new()

    def _logits_indices(self, segments: Sequence[Segment]) -> Tensor:
        rows, offset = [], 0
        for segment in segments:
            rows += [offset + row for row in segment.logits_indices]
            offset += len(segment.token_ids)
        return torch.tensor(rows, dtype=torch.long, device=self.spec.device)

    def _attach(self) -> None:
        AttentionInterface.register(ATTENTION, _attention)
        with ExitStack() as stack:
            for index, layer in enumerate(self.spec.layers):
                hook = layer.register_forward_pre_hook(self._enter_layer(index), with_kwargs=True)
                stack.callback(hook.remove)
            stack.callback(self.spec.layers[-1].register_forward_hook(self._leave_layers).remove)
            stack.callback(self.spec.head.register_forward_pre_hook(self._enter_head).remove)
            self._hooks = stack.pop_all()

    def _enter_layer(self, index: int) -> Any:
        plans = self.spec.plans[index]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            pass_ = _current.get()
            if pass_ is None or pass_.scratch is not None:
                return None
            pass_.layer = index
            if self.on_layer is not None:
                self.on_layer(index)
            hidden = args[0] if args else kwargs["hidden_states"]
            crossed = pass_.at_boundary(index, hidden)
            if not pass_.has_changed and not pass_.keeps_tables:
                return None
            hidden = hidden if crossed is None else crossed
            places = tuple(
                pass_.for_rows(plans.get(place), args[place]) for place in range(1, len(args))
            )
            names = {name: pass_.for_rows(plans.get(name), value) for name, value in kwargs.items()}
            if pass_.scores_ahead:
                pass_.note_call(index, args, kwargs)
            if pass_.is_over:
                raise _AllDeferred
            return ((hidden, *places), names) if args else ((), {**names, "hidden_states": hidden})

        return hook

    def _leave_layers(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Back to the rows that entered, so that what follows the layers finds the shape it knows."""
        pass_ = _current.get()
        if pass_ is None or not pass_.has_changed or pass_.scratch is not None:
            return None
        if isinstance(output, tuple):
            return pass_.restore(output[0]), *output[1:]
        return pass_.restore(output)

    def _enter_head(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if _current.get() is None:
            return None
        return (args[0].index_select(1, self._speak), *args[1:])


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Query (1, H, T, D), new keys and values (1, H_kv, T, D) -> (1, T, H, D_v), each segment over
    its own keys."""
    pass_ = _current.get()
    if pass_ is None:
        raise LazyAheadError(
            "lazyahead attention was called outside a pass; call the model without it"
        )
    heads = Heads(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=pass_.spec.windows[pass_.layer],
        chunk=pass_.spec.chunks[pass_.layer],
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )
    if pass_.scratch is not None:
        return pass_.scratch.attend(query, key, value, heads).transpose(1, 2).contiguous(), None
    if pass_.is_empty:
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None
    if getattr(module, "attn_temperature_tuning", False) and not getattr(module, "use_rope", True):
        query = _retuned(
            module, query, torch.cat([segment.positions for segment in pass_.segments])
        )
    outputs, start = [], 0
    for segment in pass_.segments:
        rows = slice(start, start + segment.num_rows)
        start += segment.num_rows
        if segment.num_rows:
            outputs.append(
                segment.attend(
                    pass_.layer, query[:, :, rows], key[:, :, rows], value[:, :, rows], heads
                )
            )
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return output.transpose(1, 2).contiguous(), None


def _retuned(module: Any, query: Tensor, positions: Tensor) -> Tensor:
    """llama4 scales queries of its layers without rotary positions by place in the pass; we mean
    place in the text."""
    in_pass = torch.arange(positions.numel(), device=positions.device)
    applied, meant = (
        torch.log1p(torch.floor((places.float() + 1.0) / module.floor_scale)) * module.attn_scale
        + 1.0
        for places in (in_pass, positions)
    )
    retuned: Tensor = query.float() * (meant / applied)[:, None]  # (1, H, T, D)
    return retuned.to(query.dtype)
