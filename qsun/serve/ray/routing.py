"""The request router of the pools: each request goes to the replica that it names, or fails at once.

Which replica that is the exchange decides (qsun/serve/router/workers), as it knows which pairs are warm and which
replicas have failed this request before. Ray retries a request whose replica dies before it has accepted it; with a
named replica that retry fails, so transfer parameters never reach a second one.
"""

from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from qsun.serve.ray import presence


class NamedReplica(RequestRouter):
    """Sends a request to the replica whose id is its keyword `replica`; to any where it has none."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        wanted = None if pending_request is None else pending_request.kwargs.get("replica")
        if pending_request is None or wanted is None:
            return [candidate_replicas]
        found = [replica for replica in candidate_replicas if replica.replica_id.unique_id == wanted]
        if not found:
            # Cancelled, and not failed with an error: Serve forgets a request that was cancelled, and would look for
            # one that failed without end. `calls.py` tells the caller.
            pending_request.future.cancel()
            return [candidate_replicas]  # for Serve to see that the request is over
        return [found]

    def update_replicas(self, replicas: Sequence[RunningReplica]) -> None:
        super().update_replicas(list(replicas))
        self._announce()

    def on_replica_actor_died(self, replica_id: Any) -> None:
        super().on_replica_actor_died(replica_id)
        self._announce()

    def _announce(self) -> None:
        presence.announce(self.app_name, frozenset(replica.unique_id for replica in self.curr_replicas))
