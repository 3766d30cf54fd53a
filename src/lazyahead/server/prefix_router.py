"""Ray Serve's request router for our replicas: a document stays where it was read, unless that
replica has more than its share (see `affinity`)."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from lazyahead.server.affinity import LOAD_FACTOR, order
from lazyahead.server.call import Call


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """Sends a `Call` to the replica that has most likely read its document. Loads are the calls
    that this process has sent and that have not ended."""

    queue_len_response_deadline_s = 2.0
    """A replica that computes may be slow to say how many calls it has. With Ray's 0.1 s its
    documents would go elsewhere."""
    max_queue_len_response_deadline_s = 10.0

    def initialize_state(
        self, load_factor: float = LOAD_FACTOR, places: int | None = None, affinity: bool = True
    ) -> None:
        """`places`: calls that a replica takes. Without `affinity` the least loaded is asked."""
        self._load_factor, self._places, self._affinity = load_factor, places, affinity
        self._at: dict[str, str] = {}
        """Which replica each open request is at, or is about to be."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """One replica after the other, the best one first."""
        call = pending_request.args[0] if pending_request and pending_request.args else None
        if pending_request is None or not isinstance(call, Call) or not candidate_replicas:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        names = self._order(call, list(replicas))
        self._note(pending_request, names[0])
        return [[replicas[name]] for name in names]

    def _order(self, call: Call, names: list[str]) -> list[str]:
        counts = Counter(self._at.values())
        loads = {name: counts[name] for name in names}
        if self._affinity:
            names = order(call.document, loads, self._load_factor, self._places)
        else:
            names = sorted(names, key=lambda name: (loads[name], random.random()))
        return sorted(names, key=lambda name: name != call.replica)

    def _note(self, request: PendingRequest, name: str) -> None:
        """Counts the request from now on, so that others that come at once see it."""
        number = request.metadata.internal_request_id

        def routed(chosen: asyncio.Future[Any]) -> None:
            if chosen.cancelled() or chosen.exception() is not None:
                self._at.pop(number, None)
            else:
                self._at[number] = chosen.result().replica_id.unique_id

        self._at[number] = name
        request.future.add_done_callback(routed)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """However it has ended."""
        if self._at.get(internal_request_id) == replica_id.unique_id:
            del self._at[internal_request_id]
