"""Many replicas of the server, run by Ray Serve. Needs the extra `lazyahead[ray]`.

serve run lazyahead.server.ray:app model=FOLDER replicas=2        # or `lazyahead serve --ray`
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message

from lazyahead.config import Lookahead
from lazyahead.llm import LLM
from lazyahead.server.affinity import LOAD_FACTOR
from lazyahead.server.app import create_app
from lazyahead.server.call import Call, answer
from lazyahead.server.errors import ApiError, busy
from lazyahead.server.front import Fronting, ReplicaLostError, front_app, unnamed
from lazyahead.server.prefix_router import PrefixRouter
from lazyahead.server.settings import KEY_VARIABLE, Settings

HEALTH_PERIOD_S = 5.0
_GRACE_S = 5.0  # beyond `drain_s`, for last events to be sent
_EXTRA = 64  # calls beside those that generate


class RayOptions(BaseModel):
    """What `serve run` takes as `name=value`, or a configuration file under `args`."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    model: str | None = None
    """Folder, GGUF file or hub name, the same on all nodes; None: the built-in reader."""
    dtype: str = "auto"
    device: str = "auto"
    prefill: str | None = None
    """`off`, a preset or a profile; None: balanced."""
    decode: str = "lookahead"
    memory: str | None = None
    """File that keeps answers, on one machine."""
    replicas: int = Field(default=1, ge=1)
    max_replicas: int | None = None
    """Above `replicas`: so many may be started while there is work for them."""
    target_ongoing_requests: float | None = Field(default=None, gt=0)
    """Requests that a replica should have when their number is not fixed; None: as many as run in
    one pass."""
    cpus: float = Field(default=1.0, ge=0)
    """Cores of a replica."""
    gpus: float | None = Field(default=None, ge=0)
    """GPUs of a replica; None: one where the model runs on one."""
    affinity: bool = True
    """Whether a document's questions go where it was read; else to the least busy replica."""
    load_factor: float = Field(default=LOAD_FACTOR, ge=1)
    settings: Settings = Settings()

    @model_validator(mode="after")
    def _check(self) -> RayOptions:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(
                f"max_replicas {self.max_replicas} is less than replicas {self.replicas}"
            )
        return self

    def load(self) -> LLM:
        """The model, as each replica has it."""
        given: dict[str, Any] = {} if self.prefill is None else {"prefill": self.prefill}
        decode: str | Lookahead = self.decode
        if self.memory is not None:
            decode = Lookahead(memory=self.memory)
        return LLM(self.model, dtype=self.dtype, device=self.device, decode=decode, **given)

    @property
    def num_gpus(self) -> float:
        """GPUs of a replica."""
        if self.gpus is not None:
            return self.gpus
        on_one = self.device.startswith("cuda")
        return float(on_one or (self.device == "auto" and torch.cuda.is_available()))


class Replica:
    """One model behind its worker, with the server's own app."""

    def __init__(self, options: RayOptions) -> None:
        settings = replace(options.settings, cors_origins=(), allowed_hosts=())  # the front's
        self._app = create_app(options.load(), settings)
        self._service = self._app.state.service
        self._service.replica = serve.get_replica_context().replica_id.unique_id
        self._service.start()

    async def answer(self, call: Call) -> AsyncGenerator[Message]:
        """What the app sends."""
        async for message in answer(self._app, call):
            yield message

    async def metrics(self) -> tuple[str, bytes]:
        """The replica's name, and its page of metrics."""
        return self._service.replica, self._service.metrics.text()

    def check_health(self) -> None:
        """Ray Serve calls it, and replaces a replica for which it raises."""
        if not self._service.worker.is_alive:
            raise RuntimeError("the model's thread has ended")

    def __del__(self) -> None:
        with suppress(AttributeError):  # the model could not be loaded
            self._service.stop()


class FrontDeployment:
    """Takes all requests, and hands them to the replicas."""

    def __init__(self, replicas: DeploymentHandle, options: RayOptions) -> None:
        self._replicas = replicas
        self._fronting = Fronting(options.settings)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return unnamed(front_app(self._fronting, self._ask, self._collect))

    async def drain(self, seconds: float) -> None:
        """Before an end: takes nothing new, and waits for what runs."""
        await self._fronting.drain(seconds)

    async def _ask(self, call: Call) -> AsyncGenerator[Message]:
        response = self._replicas.options(stream=True).answer.remote(call)
        try:
            async for message in response:
                yield message
        except BackPressureError:
            raise busy() from None
        except DeploymentUnavailableError:
            raise ApiError(
                503,
                "no replica can be started; the log of Ray Serve says why",
                code="no_replica",
                headers={"Retry-After": "10"},
            ) from None
        except RayActorError as error:
            raise ReplicaLostError from error
        finally:
            response.cancel()

    async def _collect(self) -> Mapping[str, bytes]:
        """Of those that answer at once."""
        with suppress(RayError, TimeoutError, asyncio.TimeoutError):
            return dict(await self._replicas.broadcast("metrics").results_async(timeout_s=5))
        return {}


def app(options: RayOptions) -> serve.Application:
    """The application, for `serve run lazyahead.server.ray:app` and for `serve.run`."""
    settings = options.settings
    key = os.environ.get(KEY_VARIABLE)
    if key and not settings.api_keys:
        settings = replace(settings, api_keys=(key,))
        options = options.model_copy(update={"settings": settings})
    places = settings.max_running + settings.max_queue
    scale: dict[str, Any] = {"num_replicas": options.replicas}
    if options.max_replicas is not None and options.max_replicas > options.replicas:
        target = options.target_ongoing_requests or settings.max_running
        scale = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=options.replicas,
                max_replicas=options.max_replicas,
                target_ongoing_requests=target,
            )
        }
    timing = {
        "health_check_period_s": HEALTH_PERIOD_S,
        "graceful_shutdown_timeout_s": settings.drain_s + _GRACE_S,
    }
    replica = serve.deployment(
        Replica,
        name="replica",
        max_ongoing_requests=max(settings.max_connections, places) + _EXTRA,
        max_queued_requests=settings.max_connections,
        request_router_config=RequestRouterConfig(
            request_router_class=PrefixRouter,
            request_router_kwargs={
                "load_factor": options.load_factor,
                "places": places,
                "affinity": options.affinity,
            },
        ),
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.num_gpus},
        **scale,
        **timing,
    )
    front = serve.deployment(
        serve.ingress()(FrontDeployment),
        name="front",
        num_replicas=1,
        max_ongoing_requests=settings.max_connections + _EXTRA,
        ray_actor_options={"num_cpus": 0},
        **timing,
    )
    return front.bind(replica.bind(options), options)
