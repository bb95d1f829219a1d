"""The planned applications as a config for `serve deploy` or a running cluster, and as a RayService for KubeRay."""

import os.path
from collections.abc import Sequence
from typing import Any

import httpx
import yaml

from qsun.errors import QsunError
from qsun.serve.cluster.schema import Cluster
from qsun.serve.http.keys import is_loopback
from qsun.serve.ray.plan import LOOPBACK_DEVICE, PlannedApp

IMAGE = "YOUR-REGISTRY/qsun-vllm:latest"
_PATH = "/api/serve/applications/"
_SECONDS = 60.0
_CLAIM, _MODULES = "qsun-modules", "modules"


def serve_config(cluster: Cluster, planned: Sequence[PlannedApp]) -> dict[str, Any]:
    """Return the config that `serve deploy` and Serve's REST API read (ray.serve.schema.ServeDeploySchema)."""
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": cluster.listen.host, "port": cluster.listen.port},
        "applications": [
            {"name": app.name, "import_path": app.import_path, "route_prefix": app.route_prefix, "args": app.args}
            for app in planned
        ],
    }


def put_config(address: str, config: dict[str, Any]) -> None:
    """Have a running cluster deploy a config, as `serve deploy` does. What has not changed is left alone.

    Args:
        address: of the dashboard, http://host:port.
    Raises:
        QsunError: it cannot be reached, or refuses the config.
    """
    if not address.startswith(("http://", "https://")):
        raise QsunError(f"--address {address} is not a dashboard's; give http://HEAD:8265")
    try:
        answer = httpx.put(address.rstrip("/") + _PATH, json=config, timeout=_SECONDS, trust_env=False)
    except httpx.HTTPError as error:
        raise QsunError(f"{address} does not answer: {error or type(error).__name__}") from None
    if answer.status_code != 200:
        raise QsunError(f"{address} answers {answer.status_code}: {' '.join(answer.text.split())[:500]}")


def ray_service(cluster: Cluster, planned: Sequence[PlannedApp], ray_version: str) -> dict[str, Any]:
    """Return a RayService: the config, and a cluster whose pods fit one worker each.

    The image, which has qsun, Ray and vLLM, and the volume with the modules are placeholders.

    Raises:
        QsunError: clients could not reach the ingress, or replicas not each other, as a pod's loopback is its own.
    """
    if cluster.ray.transfer_device == LOOPBACK_DEVICE:
        raise QsunError("ray.transfer_device lo is one pod's own; set the pods' network device, such as eth0")
    if is_loopback(cluster.listen.host):
        raise QsunError(f"listen.host {cluster.listen.host} is one pod's own; set 0.0.0.0, and listen.api_keys")
    config = yaml.safe_dump(serve_config(cluster, planned), sort_keys=False)
    count = sum(_most_workers(cluster))
    worker = {
        "groupName": "engines",
        "replicas": count,
        "minReplicas": 0,
        "maxReplicas": count,
        "rayStartParams": {},
        "template": _pod("ray-worker", _resources(cluster), cluster),
    }
    head = {
        "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},  # noqa: S104 - a pod, whose port is not published
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
    pools = (cluster.decode, *cluster.models.values())
    return [pool.scale.workers if pool.scale else pool.workers for pool in pools if isinstance(pool.workers, int)]


def _resources(cluster: Cluster) -> dict[str, str]:
    found = {"cpu": f"{max(1, round(cluster.ray.cpus + 1))}", "memory": "32Gi"}  # an ingress may be beside a worker
    if cluster.launch.device == "cuda":
        found["nvidia.com/gpu"] = str(cluster.launch.tensor_parallel_size)
    return found


def _pod(name: str, resources: dict[str, str], cluster: Cluster) -> dict[str, Any]:
    container = {
        "name": name,
        "image": IMAGE,
        "resources": {"limits": resources, "requests": resources},
        "volumeMounts": [{"name": _MODULES, "mountPath": _common_directory(cluster), "readOnly": True}],
    }
    volume = {"name": _MODULES, "persistentVolumeClaim": {"claimName": _CLAIM, "readOnly": True}}
    return {"spec": {"containers": [container], "volumes": [volume]}}


def _common_directory(cluster: Cluster) -> str:
    modules = [cluster.decode.module, *(pool.module for pool in cluster.models.values())]
    inside = [module for module in modules if module.startswith("/")]
    return os.path.commonpath(inside) if inside else "/modules"
