"""`lazyahead serve --ray`: Ray and Ray Serve on this machine, or on the cluster that RAY_ADDRESS
names, until a signal comes."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig

from lazyahead.errors import ConfigError, ModelError
from lazyahead.server.ray import RayOptions, app
from lazyahead.server.run import bind

NAME = "lazyahead"
"""Of the application in the cluster."""
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)


def run(options: RayOptions, host: str, port: int, started: Callable[[int], None]) -> int:
    """Returns the exit code: 0 after SIGTERM, 130 after Ctrl-C. Answers may go on for `drain_s`; a
    second signal ends at once."""
    port = _free(host, port)
    with cluster(options):
        handle = deploy(options, host, port)
        with _Signals() as signals:
            started(port)
            signals.wait()
            drained = handle.drain.remote(options.settings.drain_s)
            while signals.num == 1 and not _is_over(drained):
                pass
    return 130 if signals.first == signal.SIGINT else 0


def _free(host: str, port: int) -> int:
    """The port, or a free one for 0. Raises ConfigError where nothing can listen there."""
    bound = bind(host, port)
    port = bound.getsockname()[1]
    bound.close()
    return port


@contextmanager
def cluster(options: RayOptions, **given: Any) -> Iterator[None]:
    """Ray, and nothing of ours afterwards. Raises ConfigError where the cluster is too small."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS", "local")
    if address == "local":
        given = {
            "include_dashboard": False,
            "object_store_memory": 100 << 20,
            **given,
        }
    ray.init(
        address,
        namespace="lazyahead",
        log_to_driver=options.settings.log_requests,
        logging_level="ERROR",
        **given,
    )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        _check(options)
        yield
    finally:
        if address != "local":
            serve.delete(NAME)
        ray.shutdown()


def deploy(options: RayOptions, host: str, port: int) -> Any:
    """Starts the replicas and what is in front of them; returns a handle to the front."""
    http = HTTPOptions(host=host, port=port)
    serve.start(proxy_location="HeadOnly", http_options=http, logging_config=QUIET)
    try:
        return serve.run(app(options), name=NAME, logging_config=QUIET)
    except RuntimeError as error:
        raise ModelError(f"the replicas did not start: {error}") from None


def cores(replicas: int) -> float:
    """Cores of each of so many replicas on this machine; on a cluster that was there before, 1."""
    if "RAY_ADDRESS" in os.environ:
        return 1.0
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    each = (there or 1) / replicas
    return float(int(each)) if each >= 1 else each


def _check(options: RayOptions) -> None:
    num = options.max_replicas or options.replicas
    there = ray.cluster_resources()
    for name, each in (("CPU", options.cpus), ("GPU", options.num_gpus)):
        if num * each > there.get(name, 0):
            raise ConfigError(
                f"{num} replicas with {each:g} {name} each need {num * each:g}, the cluster has "
                f"{there.get(name, 0):g}; start fewer"
            )


def _is_over(drained: Any) -> bool:
    try:
        drained.result(timeout_s=0.5)
    except TimeoutError:
        return False
    return True


class _Signals:
    """Notes signals instead of dying of them."""

    def __init__(self) -> None:
        self.num = 0
        self.first: int | None = None
        self._came = threading.Event()

    def __enter__(self) -> _Signals:
        kinds = (signal.SIGINT, signal.SIGTERM)
        self._before = {kind: signal.signal(kind, self._note) for kind in kinds}
        return self

    def __exit__(self, *_: object) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)

    def wait(self) -> None:
        """Until the first one."""
        while not self._came.wait(1.0):
            pass

    def _note(self, kind: int, _: object) -> None:
        self.num += 1
        self.first = self.first or kind
        self._came.set()
