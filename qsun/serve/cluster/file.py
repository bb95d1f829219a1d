"""cluster.yaml, read and checked: which workers serve which modules (qsun/serve/cluster/schema.py has every key)."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from qsun.errors import QsunError
from qsun.serve.cluster.errors import one_line
from qsun.serve.cluster.schema import Cluster, Listen, Pool
from qsun.serve.http.keys import is_loopback

__all__ = ["Cluster", "Pool", "parse_cluster", "read_cluster", "with_workers"]

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,99}")  # it is a metrics label and part of a URL
_LARGEST_FILE_BYTES = 1 << 20


def read_cluster(path: Path) -> Cluster:
    """Read and check cluster.yaml; directories in it are relative to it.

    Raises:
        QsunError: one line that names the value, the limit and the fix.
    """
    try:
        if path.stat().st_size > _LARGEST_FILE_BYTES:
            raise QsunError(f"{path} is larger than {_LARGEST_FILE_BYTES} bytes; is it a cluster file?")
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise QsunError(f"cluster file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise QsunError(f"cluster file {path} is not YAML: {' '.join(str(error).split())}") from None
    return _with_absolute_paths(parse_cluster(values, str(path)), path.resolve().parent)


def parse_cluster(values: object, name: str = "cluster") -> Cluster:
    """A cluster from plain values, its paths as they are. `name` stands for the file in errors."""
    if not isinstance(values, dict):
        raise QsunError(f"{name} holds no mapping with the keys decode and models")
    try:
        cluster = Cluster.model_validate(values)
    except ValidationError as error:
        raise QsunError(f"{name}: {one_line(error, Cluster)}") from None
    _check_names(cluster, name)
    _check_listen(cluster.listen, name)
    return cluster


def with_workers(
    cluster: Cluster, decode: Sequence[str] | None = None, models: Mapping[str, Sequence[str]] | None = None
) -> Cluster:
    """The same cluster with the URLs of workers that `qsun up` started in place of their numbers."""
    values = cluster.model_dump()
    if decode is not None:
        values["decode"]["workers"] = list(decode)
    for name, urls in (models or {}).items():
        values["models"][name]["workers"] = list(urls)
    return parse_cluster(values)


def _check_names(cluster: Cluster, name: str) -> None:
    for model in cluster.models:
        if not _MODEL_NAME.fullmatch(model):
            raise QsunError(f"{name}: model name {model!r} is not taken; use up to 100 of A-Z a-z 0-9 . _ : / -")
    seen: dict[str, str] = {}
    pools = [("decode", cluster.decode), *((f"models.{model}", pool) for model, pool in cluster.models.items())]
    for where, pool in pools:
        for url in pool.urls:
            if url in seen:
                raise QsunError(f"{name}: worker {url} is in {seen[url]} and in {where}; a worker has one module")
            seen[url] = where
    _check_assignment(cluster, name)


def _check_assignment(cluster: Cluster, name: str) -> None:
    partitioned = cluster.policy == "partitioned"
    for where, pool in (("decode", cluster.decode), *cluster.models.items()):
        for worker in () if isinstance(pool.workers, int) else pool.workers:
            if worker.models is not None and not (where == "decode" and partitioned):
                raise QsunError(f"{name}: {worker.url} has `models`, which only decode workers of `partitioned` take")
            unknown = sorted(set(worker.models or ()) - set(cluster.models))
            if unknown:
                raise QsunError(
                    f"{name}: {worker.url} is for {unknown[0]!r}; known models: {', '.join(cluster.models)}"
                )
    if partitioned:
        _check_partition(cluster, name)


def _check_partition(cluster: Cluster, name: str) -> None:
    workers = cluster.decode.workers
    assigned = [] if isinstance(workers, int) else [worker.models for worker in workers]
    if any(models is not None for models in assigned):
        if not all(assigned):
            raise QsunError(f"{name}: some decode workers have `models` and some have none; give each its own")
        left = [model for model in cluster.models if not any(model in (models or ()) for models in assigned)]
        if left:
            raise QsunError(f"{name}: no decode worker is for model {left[0]!r}; add it to the `models` of one")
        return
    count = workers if isinstance(workers, int) else len(workers)
    if count < len(cluster.models):
        raise QsunError(
            f"{name}: partitioned needs a decode worker a model, and there are {count} for {len(cluster.models)}; "
            "add workers, or give each its `models`"
        )


def _check_listen(listen: Listen, name: str) -> None:
    if listen.api_keys is None and not listen.without_keys and not is_loopback(listen.host):
        raise QsunError(
            f"{name}: listen.host {listen.host} can be reached by others and no API key is asked for; set "
            "listen.api_keys to a file of keys, or listen.without_keys: true"
        )


def _with_absolute_paths(cluster: Cluster, directory: Path) -> Cluster:
    def placed(pool: Pool) -> Pool:
        inside = directory / pool.module
        return pool.model_copy(update={"module": str(inside) if inside.is_dir() or pool.module != "demo" else "demo"})

    keys = cluster.listen.api_keys
    listen = cluster.listen.model_copy(update={"api_keys": None if keys is None else directory / keys})
    models = {model: placed(pool) for model, pool in cluster.models.items()}
    return cluster.model_copy(update={"listen": listen, "decode": placed(cluster.decode), "models": models})


class _UniqueKeys(yaml.SafeLoader):
    """SafeLoader that refuses a key that is there twice: the first of two models would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key.value, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is there twice", key.start_mark)
            seen.add(key.value if isinstance(key.value, str) else id(key))
        return super().construct_mapping(node, deep)
