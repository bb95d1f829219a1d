"""What `qsun up` deploys, decided before anything runs: an application for each pool, and the ingress.

Each pool is an application of its own, so that Ray Serve replaces the replicas of a module that has changed, and no
others: it compares applications by their arguments, and the module's fingerprint is one of them.
"""

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qsun.errors import QsunError
from qsun.serve.cluster.names import ServedNames
from qsun.serve.cluster.schema import Cluster, Pool

DECODE_APP, ADAPTERS_APP, INGRESS_APP = "qsun-decode", "qsun-prefill", "qsun"
ENGINE, INGRESS = "Engine", "Ingress"  # the deployments in them
LAST_SECONDS = 5.0  # of the ingress beside `limits.drain_seconds`, for errors to reach clients
_BUILDERS = "qsun.serve.ray.apps"
_START_SECONDS = 30.0  # beside the drain, for vLLM to end


@dataclass(frozen=True)
class PlannedApp:
    """A Serve application.

    Attributes:
        import_path: of the function that builds it. args: JSON values for that function.
        deployment: its name. replicas: Serve's options for their number, which are not among the arguments: if only
            the number changes, the replicas that there are stay.
        route_prefix: None: it is reached through handles only.
    """

    name: str
    import_path: str
    args: dict[str, Any]
    deployment: str
    replicas: dict[str, Any]
    route_prefix: str | None = None


def plan_apps(cluster: Cluster, names: ServedNames) -> list[PlannedApp]:
    """Return the applications of a cluster file, the ingress last.

    Raises:
        QsunError: a pool lists running workers, or its largest number is less than its least; adapters need our plugin.
    """
    _check(cluster)
    apps = [_pool_app(name, pool, served, cluster) for name, pool, served in _pools(cluster, names)]
    args = {"cluster": _exchange(cluster), "pools": [app.name for app in apps], "deployment": _ingress(cluster)}
    replicas = {"num_replicas": cluster.ray.ingress_replicas}
    return [*apps, PlannedApp(INGRESS_APP, f"{_BUILDERS}:ingress", args, INGRESS, replicas, "/")]


def pool_app(model: str) -> str:
    """Return the name of the application of a model's prefill replicas.

    It depends on the model's name alone: where a model comes or moves in the file, no other's replicas restart. It is
    valid as a file name; the hash tells apart models that differ in other characters only.
    """
    readable = re.sub(r"[^A-Za-z0-9-]", "-", model)
    return f"qsun-prefill-{readable}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"


def _check(cluster: Cluster) -> None:
    for where, pool in cluster.pools.items():
        if not isinstance(pool.workers, int):
            raise QsunError(
                f"{where}.workers lists running workers, and qsun up starts its own; give their number, or use "
                "`qsun route` for running workers"
            )
        if pool.scale is not None and pool.scale.workers < pool.workers:
            raise QsunError(f"{where}.scale.workers {pool.scale.workers} is less than {where}.workers {pool.workers}")
    if cluster.one_engine and cluster.launch.kernels == "vllm":
        raise QsunError(
            f"models.{next(iter(cluster.adapters))} is an adapter without prefill workers, and launch.kernels vllm is "
            "without our plugin, which keeps adapters to prompts; drop it, or give prefill: {module: ..., workers: ...}"
        )
    if cluster.one_engine and cluster.launch.prefill_arguments:
        raise QsunError(
            "launch.prefill_arguments is for prefill workers, and there are none; use launch.decode_arguments"
        )


def _pools(cluster: Cluster, names: ServedNames) -> Iterator[tuple[str, Pool, dict[str, Any]]]:
    """Yield each pool's application, the pool, and what its workers serve."""
    adapters = {
        model: {"served_name": names.prefill[model], "directory": entry.adapter}
        for model, entry in cluster.adapters.items()
    }
    if cluster.one_engine:
        yield DECODE_APP, cluster.decode, _served("aggregated", names.decode, adapters=adapters)
    else:
        yield DECODE_APP, cluster.decode, _served("decode", names.decode)
    if cluster.prefill is not None:
        yield ADAPTERS_APP, cluster.prefill, _served("prefill", names.shared, adapters=adapters)
    for model, pool in cluster.models.items():
        if not pool.adapter:
            yield pool_app(model), pool, _served("prefill", names.prefill[model], model)


def _served(
    role: str, name: str, model: str | None = None, adapters: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    return {"role": role, "model": model, "served_name": name, "adapters": adapters or {}}


def _pool_app(name: str, pool: Pool, served: dict[str, Any], cluster: Cluster) -> PlannedApp:
    engine = served | {
        "pool": name.removeprefix("qsun-"),
        "module": pool.module,
        "launch": cluster.launch.model_dump(mode="json", exclude_defaults=True),
        # the router leaves the length of open requests to an engine that answers alone
        "max_tokens": cluster.limits.max_tokens if served["role"] == "aggregated" else None,
        "deadline_seconds": cluster.limits.deadline_seconds,
        "gather_seconds": cluster.limits.gather_seconds,
        "transfer_device": cluster.ray.transfer_device,
        "linger_seconds": cluster.ray.linger_seconds if served["role"] == "prefill" else 0.0,
        "health_seconds": cluster.health.timeout_seconds,
        "logs": cluster.ray.logs,
    }
    args = {"engine": engine, "deployment": dict(_engines(cluster))}
    return PlannedApp(name, f"{_BUILDERS}:engines", args, ENGINE, _replicas(pool))


def _engines(cluster: Cluster) -> Iterator[tuple[str, Any]]:
    """Yield Serve's options of a pool's deployment."""
    limits, ray = cluster.limits, cluster.ray
    yield "ray_actor_options", {"num_cpus": ray.cpus, "num_gpus": gpus_of_replica(cluster), "resources": ray.resources}
    # the ingress bounds requests; its health checks must get through beside as many as it admits
    yield "max_ongoing_requests", 2 * limits.concurrent_requests * ray.ingress_replicas + 64
    yield "health_check_period_s", cluster.health.interval_seconds
    yield "health_check_timeout_s", 2 * cluster.health.timeout_seconds
    yield "graceful_shutdown_wait_loop_s", 0.5
    yield "graceful_shutdown_timeout_s", limits.drain_seconds + ray.linger_seconds + _START_SECONDS
    yield "logging_config", {"enable_access_log": False}  # a line for each health check and each half of a request
    yield "max_surge_percent", ray.surge_percent
    yield "request_router_config", {"request_router_class": "qsun.serve.ray.routing:NamedReplica"}


def gpus_of_replica(cluster: Cluster) -> float:
    """Return how many of its node's GPUs a replica takes; a part of one where several share it."""
    if cluster.ray.gpus is not None:
        return cluster.ray.gpus
    return 0 if cluster.launch.device == "cpu" else cluster.launch.tensor_parallel_size


def _replicas(pool: Pool) -> dict[str, Any]:
    if pool.scale is None:
        return {"num_replicas": pool.workers}
    scaling = {
        "min_replicas": pool.workers,
        "max_replicas": pool.scale.workers,
        "upscale_delay_s": pool.scale.up_seconds,
        "downscale_delay_s": pool.scale.down_seconds,
        "metrics_interval_s": min(1.0, pool.scale.up_seconds),
        "look_back_period_s": min(5.0, pool.scale.up_seconds),
        "policy": {
            "policy_function": "qsun.serve.ray.scaling:ByOutstandingTokens",
            "policy_kwargs": {"tokens": pool.scale.tokens},
        },
    }
    return {"autoscaling_config": scaling}


def needed_resources(planned: Sequence[PlannedApp], updating: bool = False) -> dict[str, float]:
    """Return what the applications take of each of Ray's resources at their largest, by Ray's names.

    Args:
        updating: with the replicas that `ray.surge_percent` adds while modules change.
    """
    needed: defaultdict[str, float] = defaultdict(float)
    for app in planned:
        deployment = app.args["deployment"]
        count = app.replicas.get("num_replicas") or app.replicas["autoscaling_config"]["max_replicas"]
        if updating:
            count += math.ceil(count * deployment.get("max_surge_percent", 0) / 100)
        options = deployment["ray_actor_options"]
        taken = {"CPU": options["num_cpus"], "GPU": options.get("num_gpus", 0)} | options.get("resources", {})
        for name, amount in taken.items():
            needed[name] += count * amount
    return {name: amount for name, amount in needed.items() if amount}


def _exchange(cluster: Cluster) -> dict[str, Any]:
    """Return what of the cluster the ingress uses: all but modules, numbers of replicas, and how they run.

    They stay the same when a module changes, so Serve does not replace the ingress. It reads them as a cluster file.
    """
    values = cluster.model_dump(
        mode="json", exclude_defaults=True, exclude={"decode", "prefill", "models", "launch", "ray"}
    )
    pool = {"module": "demo", "workers": len(cluster.models)}  # `partitioned` wants as many decode workers as models
    return values | {"decode": pool, "models": {model: {"module": "demo", "workers": 1} for model in cluster.models}}


def _ingress(cluster: Cluster) -> dict[str, Any]:
    limits = cluster.limits
    return {
        "ray_actor_options": {"num_cpus": 1.0},
        "max_ongoing_requests": cluster.guard_config(()).max_requests + 64,
        "health_check_period_s": cluster.health.interval_seconds,
        "graceful_shutdown_timeout_s": limits.drain_seconds + LAST_SECONDS,
        "graceful_shutdown_wait_loop_s": 0.5,
        "max_surge_percent": 1,  # rounded up: one new ingress starts before an old one stops
    }
