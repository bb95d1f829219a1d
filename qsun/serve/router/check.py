"""`qsun route --check`: whether every worker of a cluster answers and serves its module."""

import asyncio
from typing import Any

import httpx

from qsun.serve.cluster.names import ServedNames
from qsun.serve.cluster.schema import Cluster
from qsun.serve.router.exchange.identity import identity_fault
from qsun.serve.router.workers.fleet import Fleet
from qsun.serve.router.workers.worker import Worker


async def check_workers(cluster: Cluster, names: ServedNames) -> dict[str, Any]:
    """Ask each worker once. Return {"ok", "workers": [{url, role, model, served_name, fault}]}."""
    fleet = Fleet()
    fleet.update(cluster, names)
    seconds = cluster.health.timeout_seconds
    async with httpx.AsyncClient(trust_env=False) as client:
        workers = await asyncio.gather(*(_checked(client, worker, seconds) for worker in fleet))
    return {"ok": all(worker["fault"] is None for worker in workers), "workers": workers}


async def _checked(client: httpx.AsyncClient, worker: Worker, seconds: float) -> dict[str, Any]:
    try:
        async with asyncio.timeout(seconds):
            fault = await identity_fault(client, worker)
    except TimeoutError:
        fault = f"does not answer within {seconds:g} seconds"
    except httpx.HTTPError as error:
        fault = f"does not answer: {error or type(error).__name__}"
    if fault is None and worker.lacking:
        fault = f"it does not serve the adapters of {', '.join(sorted(worker.lacking))}; start it with them"
    return {
        "url": worker.url,
        "role": worker.role,
        "model": worker.model,
        "served_name": worker.served_name,
        "adapters": dict(worker.adapters),
        "fault": fault,
    }
