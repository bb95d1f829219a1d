"""The planned applications as a config for `serve deploy` or a running cluster, and as a RayService for KubeRay."""

import json
import math
import os.path
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml

from qsun.errors import QsunError
from qsun.serve.cluster.schema import Cluster
from qsun.serve.http.keys import is_loopback
from qsun.serve.ray.engine.command import LOOPBACK_DEVICE
from qsun.serve.ray.plan import PlannedApp, gpus_of_replica

IMAGE = "YOUR-REGISTRY/qsun-vllm:latest"
_PATH = "/api/serve/applications/"
_SECONDS = 60.0
_ATTEMPTS, _AGAIN_SECONDS = 4, 3.0
_CLAIM, _MODULES = "qsun-modules", "modules"
_SECRET, _KEYS = "qsun-keys", "keys"


def serve_config(cluster: Cluster, planned: Sequence[PlannedApp]) -> dict[str, Any]:
    """Return the config that `serve deploy` and Serve's REST API read (ray.serve.schema.ServeDeploySchema)."""
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": cluster.listen.host, "port": cluster.listen.port},
        "applications": [
            {
                "name": app.name,
                "import_path": app.import_path,
                "route_prefix": app.route_prefix,
                "args": app.args,
                "deployments": [{"name": app.deployment} | app.replicas],
            }
            for app in planned
        ],
    }


def put_config(address: str, config: dict[str, Any], token: str | None) -> None:
    """Have a running cluster deploy a config, as `serve deploy` does. What has not changed is left alone.

    Args:
        address: of the dashboard, http://host:port. token: of the cluster, if it requires one; errors never hold it.
    Raises:
        QsunError: it cannot be reached, or refuses the token or the config.
    """
    if not address.startswith(("http://", "https://")):
        raise QsunError(f"--address {address} is not the address of a dashboard; give http://HEAD:8265")
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    url = address.rstrip("/") + _PATH
    for attempt in range(_ATTEMPTS):
        try:
            answer = httpx.put(url, json=config, headers=headers, timeout=_SECONDS, trust_env=False)
        except httpx.HTTPError as error:
            raise QsunError(f"{address} does not answer: {error or type(error).__name__}") from None
        if answer.status_code < 500 or attempt == _ATTEMPTS - 1:
            break
        time.sleep(_AGAIN_SECONDS)  # Serve takes long to start on a busy machine; the same config twice is one
    if answer.status_code in (401, 403):
        wants = "requires a token" if token is None else "refuses this token"
        raise QsunError(
            f"{address} answers {answer.status_code}: it {wants}; set RAY_AUTH_TOKEN to that of the cluster, or "
            "RAY_AUTH_TOKEN_PATH to its file, and RAY_AUTH_MODE to token"
        )
    if answer.status_code != 200:
        raise QsunError(f"{address} answers {answer.status_code}: {' '.join(answer.text.split())[-500:]}")


def ray_token(environment: Mapping[str, str]) -> str | None:
    """Return this user's token of Ray from where Ray looks for it; None: there is none, or RAY_AUTH_MODE is disabled.

    Errors never hold it.

    Raises:
        QsunError: its file cannot be read, or it cannot be sent in a header.
    """
    if environment.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return None
    token, where = environment.get("RAY_AUTH_TOKEN", "").strip(), "RAY_AUTH_TOKEN"
    if not token:
        path = environment.get("RAY_AUTH_TOKEN_PATH")
        file = Path(path) if path else Path.home() / ".ray" / "auth_token"
        where = str(file)
        if not path and not file.is_file():
            return None
        try:
            token = file.read_text(encoding="ascii", errors="replace").strip()
        except OSError as error:
            raise QsunError(
                f"Ray's token in {file} cannot be read: {error.strerror}; correct RAY_AUTH_TOKEN_PATH"
            ) from None
    if not re.fullmatch(r"[!-~]+", token):  # httpx names an invalid header with its value
        raise QsunError(f"the token in {where} is empty or not valid in an HTTP header; create another one")
    return token


def ray_service(cluster: Cluster, planned: Sequence[PlannedApp], ray_version: str) -> dict[str, Any]:
    """Return a RayService: the config, and a cluster whose pods fit one worker each.

    The image, which has qsun, Ray and vLLM, and the claim with the modules are placeholders. API keys are a Secret's.

    Raises:
        QsunError: clients could not reach the ingress, or replicas not each other, as a pod's loopback is its own; or
            one volume cannot have all modules, or has the API keys too.
    """
    if cluster.ray.transfer_device == LOOPBACK_DEVICE and not cluster.one_engine:
        raise QsunError("ray.transfer_device lo stays in one pod; set the pods' network device, such as eth0")
    if is_loopback(cluster.listen.host):
        raise QsunError(
            f"listen.host {cluster.listen.host} is reachable in one pod only; set 0.0.0.0 and listen.api_keys"
        )
    config = yaml.safe_dump(serve_config(cluster, planned), sort_keys=False)
    count = sum(_most_workers(cluster))
    worker = {
        "groupName": "engines",
        "replicas": count,
        "minReplicas": 0,
        "maxReplicas": count,
        "rayStartParams": _own_resources(cluster),
        "template": _pod("ray-worker", _resources(cluster), cluster),
    }
    # KubeRay's controller talks to the dashboard; its head Service exposes it to all that reach it inside the cluster
    head = {
        "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},  # noqa: S104
        "template": _pod("ray-head", {"cpu": "2", "memory": "8Gi"}, cluster),
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "qsun"},
        "spec": {
            "serveConfigV2": config,
            "rayClusterConfig": {"rayVersion": ray_version, "headGroupSpec": head, "workerGroupSpecs": [worker]},
        },
    }


def _most_workers(cluster: Cluster) -> list[int]:
    pools = cluster.pools.values()
    return [pool.scale.workers if pool.scale else pool.workers for pool in pools if isinstance(pool.workers, int)]


def _resources(cluster: Cluster) -> dict[str, str]:
    # ingresses, one more of them during an update, are beside workers
    ingresses = math.ceil((cluster.ray.ingress_replicas + 1) / sum(_most_workers(cluster)))
    found = {"cpu": str(math.ceil(cluster.ray.cpus + ingresses)), "memory": "32Gi"}
    # replicas that share a GPU, or have Ray count none, still run on one
    least = cluster.launch.tensor_parallel_size if cluster.launch.device == "cuda" else 0
    gpus = max(math.ceil(gpus_of_replica(cluster)), least)
    return found | ({"nvidia.com/gpu": str(gpus)} if gpus else {})


def _own_resources(cluster: Cluster) -> dict[str, str]:
    """Return `ray.resources` as the parameter of a pod that fits one worker: KubeRay wants JSON, quoted for a shell.

    A replica may take a part of a resource, but a node has whole ones only.
    """
    resources = {name: math.ceil(amount) for name, amount in cluster.ray.resources.items()}
    return {"resources": json.dumps(json.dumps(resources))} if resources else {}


def _pod(name: str, resources: dict[str, str], cluster: Cluster) -> dict[str, Any]:
    directory, keys = _common_directory(cluster), cluster.listen.api_keys
    mounts = [{"name": _MODULES, "mountPath": directory, "readOnly": True}]
    volumes: list[dict[str, Any]] = [
        {"name": _MODULES, "persistentVolumeClaim": {"claimName": _CLAIM, "readOnly": True}}
    ]
    if keys is not None:
        if keys.is_relative_to(directory):
            raise QsunError(
                f"listen.api_keys {keys} is in {directory}, the modules' volume; give the keys a path outside it, such "
                "as /keys/keys"
            )
        mounts.append({"name": _KEYS, "mountPath": str(keys), "subPath": keys.name, "readOnly": True})
        items = [{"key": keys.name, "path": keys.name}]  # without it in the Secret the pod says so and does not start
        volumes.append({"name": _KEYS, "secret": {"secretName": _SECRET, "items": items}})
    container = {
        "name": name,
        "image": IMAGE,
        "resources": {"limits": resources, "requests": resources},
        "volumeMounts": mounts,
    }
    return {"spec": {"containers": [container], "volumes": volumes}}


def _common_directory(cluster: Cluster) -> str:
    modules = [pool.module for pool in cluster.pools.values()]
    modules += [entry.adapter for entry in cluster.adapters.values()]
    inside = [module for module in modules if module.startswith("/")]
    found = os.path.commonpath(inside) if inside else "/modules"
    if found == "/":
        raise QsunError(
            f"the modules {', '.join(inside[:3])} share no directory but /, and pods mount one volume; put "
            "all under one, such as /modules"
        )
    return found
