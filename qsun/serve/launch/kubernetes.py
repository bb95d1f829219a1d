"""The same cluster on many machines: a Kubernetes sketch, to be read and adapted. Nothing here was run on one."""

from typing import Any

import yaml

from qsun.serve.cluster.modules import ServedNames
from qsun.serve.cluster.schema import Cluster, Launch, Pool
from qsun.serve.launch.plan import WorkerPlace, worker_command

IMAGE = "registry.example/vllm-qsun:1"
_PORT, _SIDE_CHANNEL_PORT, _ROUTER_PORT = 8000, 5600, 8000
_POD_IP = "$(POD_IP)"  # Kubernetes puts the value in
_HEAD = """\
# A sketch for Kubernetes, to be adapted: it was not run. What must hold on any set of machines:
# - image: vLLM, NIXL and qsun (its plugin); /modules/NAME: the module directories, read-only, the router's too: it
#   checks the pairs and every worker's fingerprint by them;
# - workers have no keys of their own: only the router may reach them (a NetworkPolicy), and decode workers must reach
#   the side channel and the NIXL transport of prefill workers;
# - every worker is addressed by itself, hence StatefulSets: a balancer before workers would break transfers.
"""


def kubernetes_sketch(cluster: Cluster, names: ServedNames) -> str:
    """YAML documents: for each pool a headless service and a stateful set, and the router with its cluster.yaml."""
    launch = cluster.launch.model_copy(update={"python": "python3", "gpus": None, "environment": {}})
    pools: list[tuple[str, str | None, Pool, str]] = [("decode", None, cluster.decode, names.decode)]
    for number, (name, pool) in enumerate(cluster.models.items()):
        pools.append((f"prefill-{number}", name, pool, names.prefill[name]))
    documents = []
    for service, model, pool, served in pools:
        documents += [_service(service), _workers(service, model, pool, served, launch)]
    documents += [_router_file(cluster, pools), _router()]
    return _HEAD + yaml.safe_dump_all(documents, sort_keys=False, width=120)


def _count(pool: Pool) -> int:
    return pool.workers if isinstance(pool.workers, int) else len(pool.workers)


def _service(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"app": name}},
    }


def _workers(name: str, model: str | None, pool: Pool, served: str, launch: Launch) -> dict[str, Any]:
    place = WorkerPlace(_PORT, _SIDE_CHANNEL_PORT, host=_POD_IP)
    command = worker_command(name, model, pool.module, served, launch, place)
    argv = list(command.argv)
    argv[argv.index("--model") + 1] = f"/modules/{name}"
    environment: list[dict[str, Any]] = [{"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}]
    environment += [{"name": key, "value": value} for key, value in sorted(command.environment.items())]
    container: dict[str, Any] = {
        "name": "vllm",
        "image": IMAGE,
        "command": argv,
        "env": environment,
        "ports": [{"containerPort": _PORT}, {"containerPort": _SIDE_CHANNEL_PORT}],
        "startupProbe": {
            "httpGet": {"path": "/health", "port": _PORT},
            "periodSeconds": 5,
            "failureThreshold": max(1, int(launch.start_seconds // 5)),
        },
        "volumeMounts": [{"name": "modules", "mountPath": "/modules", "readOnly": True}],
    }
    if launch.device == "cuda":
        container["resources"] = {"limits": {"nvidia.com/gpu": launch.tensor_parallel_size}}
    return _set("StatefulSet", name, _count(pool), container, [_modules()])


def _router_file(cluster: Cluster, pools: list[tuple[str, str | None, Pool, str]]) -> dict[str, Any]:
    def pool_of(name: str, pool: Pool) -> dict[str, Any]:
        urls = [f"http://{name}-{index}.{name}:{_PORT}" for index in range(_count(pool))]
        assigned = [None] * len(urls) if isinstance(pool.workers, int) else [worker.models for worker in pool.workers]
        workers = [
            url if models is None else {"url": url, "models": list(models)}
            for url, models in zip(urls, assigned, strict=True)
        ]
        return {"module": f"/modules/{name}", "workers": workers}

    values: dict[str, Any] = {
        "listen": {"host": "0.0.0.0", "port": _ROUTER_PORT, "api_keys": "/keys/api-keys"},  # noqa: S104 - with keys
        "policy": cluster.policy,
        "decode": pool_of(pools[0][0], pools[0][2]),
        "models": {model: pool_of(name, pool) for name, model, pool, _ in pools[1:]},
    }
    for section in ("limits", "health"):
        if chosen := getattr(cluster, section).model_dump(exclude_unset=True):  # what is left out has its default there
            values[section] = chosen
    text = yaml.safe_dump(values, sort_keys=False, width=120)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "qsun-cluster"},
        "data": {"cluster.yaml": text},
    }


def _router() -> dict[str, Any]:
    container = {
        "name": "router",
        "image": IMAGE,
        "command": ["qsun", "route", "/cluster/cluster.yaml"],
        "ports": [{"containerPort": _ROUTER_PORT}],
        "readinessProbe": {"httpGet": {"path": "/ready", "port": _ROUTER_PORT}},
        "volumeMounts": [
            {"name": "modules", "mountPath": "/modules", "readOnly": True},
            {"name": "cluster", "mountPath": "/cluster"},
            {"name": "keys", "mountPath": "/keys", "readOnly": True},
        ],
    }
    volumes = [
        _modules(),
        {"name": "cluster", "configMap": {"name": "qsun-cluster"}},
        {"name": "keys", "secret": {"secretName": "qsun-api-keys"}},
    ]
    return _set("Deployment", "router", 1, container, volumes)


def _set(kind: str, name: str, replicas: int, container: dict[str, Any], volumes: list[Any]) -> dict[str, Any]:
    spec: dict[str, Any] = {"replicas": replicas, "selector": {"matchLabels": {"app": name}}}
    if kind == "StatefulSet":
        spec |= {"serviceName": name, "podManagementPolicy": "Parallel"}
    spec["template"] = {
        "metadata": {"labels": {"app": name}},
        "spec": {"containers": [container], "volumes": volumes},
    }
    return {"apiVersion": "apps/v1", "kind": kind, "metadata": {"name": name}, "spec": spec}


def _modules() -> dict[str, Any]:
    return {"name": "modules", "persistentVolumeClaim": {"claimName": "modules", "readOnly": True}}
