"""cluster.yaml, read and checked: which workers serve which modules (qsun/serve/cluster/schema.py has every key)."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from qsun.config import read_config_file
from qsun.errors import QsunError
from qsun.serve.cluster.schema import Cluster, Model, Pool
from qsun.serve.http.keys import check_exposed

__all__ = ["Cluster", "Pool", "need_running_workers", "parse_cluster", "read_cluster"]

P = TypeVar("P", bound=Pool)
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,99}")  # it is a metrics label and part of a URL
_KEYS_FIX = "set listen.api_keys to a file of keys, or listen.without_keys: true"


def read_cluster(path: Path) -> Cluster:
    """Read and check cluster.yaml; directories in it are relative to it.

    Raises:
        QsunError: one line that names the value, the limit and the fix.
    """
    values = read_config_file(path, "cluster file")
    return _with_absolute_paths(parse_cluster(values, str(path)), path.resolve().parent)


def parse_cluster(values: Mapping[str, object], name: str = "cluster") -> Cluster:
    """Return a cluster from plain values, its paths unchanged. `name` stands for the file in errors."""
    try:
        cluster = Cluster.from_dict(values)
        _check_names(cluster)
        _check_adapters(cluster)
        _check_assignment(cluster)
        listen = cluster.listen
        check_exposed(listen.host, listen.api_keys is not None or listen.without_keys, _KEYS_FIX)
    except QsunError as error:
        raise QsunError(f"{name}: {error}") from None
    return cluster


def need_running_workers(cluster: Cluster) -> None:
    """Raise QsunError if a pool has a number in place of URLs, or its workers are such as only `qsun up` starts."""
    if cluster.one_engine:
        raise QsunError(
            f"models.{min(cluster.adapters)} is an adapter without prefill workers, which only `qsun up` serves; give "
            "the weights that it was tuned on as prefill: {module: ..., workers: ...}"
        )
    for name, pool in cluster.pools.items():
        if isinstance(pool.workers, int):
            raise QsunError(
                f"{name}.workers is the number {pool.workers}; list the URLs of running workers, or let `qsun up` "
                "start that many"
            )


def _check_names(cluster: Cluster) -> None:
    for model in cluster.models:
        if not _MODEL_NAME.fullmatch(model):
            raise QsunError(f"model name {model!r} is invalid; use up to 100 of A-Z a-z 0-9 . _ : / -")
    seen: dict[str, str] = {}
    for where, pool in cluster.pools.items():
        for url in pool.urls:
            if url in seen:
                raise QsunError(f"worker {url} is in {seen[url]} and in {where}; a worker serves one module")
            seen[url] = where


def _check_adapters(cluster: Cluster) -> None:
    others = [model for model in cluster.models if model not in cluster.adapters]
    if cluster.one_engine and (others or cluster.policy == "partitioned"):
        why = f"models.{others[0]} is a full module" if others else "policy partitioned is about decode workers alone"
        raise QsunError(
            f"models.{next(iter(cluster.adapters))} is an adapter without prefill workers, and {why}; give the weights "
            "that it was tuned on as prefill: {module: ..., workers: ...}"
        )
    if cluster.prefill is not None and not cluster.adapters:
        raise QsunError(
            "prefill has workers for adapters, but there are none; give models.NAME.adapter, or drop prefill"
        )


def _check_assignment(cluster: Cluster) -> None:
    partitioned = cluster.policy == "partitioned"
    for where, pool in cluster.pools.items():
        for worker in () if isinstance(pool.workers, int) else pool.workers:
            if worker.models is not None and not (where == "decode" and partitioned):
                raise QsunError(f"{worker.url} has `models`, which are for decode workers under `partitioned` only")
            unknown = sorted(set(worker.models or ()) - set(cluster.models))
            if unknown:
                raise QsunError(f"{worker.url} is for {unknown[0]!r}; known models: {', '.join(cluster.models)}")
    if partitioned:
        _check_partition(cluster)


def _check_partition(cluster: Cluster) -> None:
    workers = cluster.decode.workers
    assigned = [] if isinstance(workers, int) else [worker.models for worker in workers]
    if any(models is not None for models in assigned):
        if not all(assigned):
            raise QsunError("some decode workers have `models` and some have none; give each its own")
        left = [model for model in cluster.models if not any(model in (models or ()) for models in assigned)]
        if left:
            raise QsunError(f"no decode worker is for model {left[0]!r}; add it to the `models` of one")
        return
    count = workers if isinstance(workers, int) else len(workers)
    if count < len(cluster.models):
        raise QsunError(
            f"partitioned needs a decode worker for each model, and there are {count} for {len(cluster.models)}; "
            "add workers, or give each its `models`"
        )


def _with_absolute_paths(cluster: Cluster, directory: Path) -> Cluster:
    def placed(pool: P) -> P:
        if isinstance(pool, Model) and pool.adapter:
            return pool.model_copy(update={"adapter": str(directory / pool.adapter)})
        inside = directory / pool.module
        return pool.model_copy(update={"module": str(inside) if inside.is_dir() or pool.module != "demo" else "demo"})

    keys = cluster.listen.api_keys
    listen = cluster.listen.model_copy(update={"api_keys": None if keys is None else directory / keys})
    models = {model: placed(pool) for model, pool in cluster.models.items()}
    prefill = None if cluster.prefill is None else placed(cluster.prefill)
    pools = {"decode": placed(cluster.decode), "prefill": prefill, "models": models}
    return cluster.model_copy(update={"listen": listen, **pools})
