"""The command and environment of every vLLM worker that `qsun up` starts, decided before anything runs."""

import json
import re
import shlex
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qsun.errors import QsunError
from qsun.model.checkpoint import read_json
from qsun.model.locate import find_model
from qsun.model.pairing import ADAPTER
from qsun.serve.cluster.names import ServedNames
from qsun.serve.cluster.schema import Cluster, LaunchSettings

LOOPBACK = "127.0.0.1"
API_SERVER = "vllm.entrypoints.openai.api_server"
KV_GUARD = "qsun.vllm.kv_guard.RequireKvCache"
PREFILL_LORA = "QSUN_PREFILL_LORA"  # the switch of qsun/vllm/prefill_lora.py
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's --max-lora-rank takes
_LARGEST_PORT = 65535
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_LOOPBACK_DEVICE = "lo"  # its name on Linux, the only system on which vLLM runs workers


@dataclass(frozen=True)
class WorkerCommand:
    """A worker to start.

    Attributes:
        name: decode-0, prefill-0-math ...; unique, and valid as a file name.
        model: whose prefill module it serves; None: the decode module, or adapters.
        argv: the whole command. environment: variables to add to the launcher's own.
        url: its address. served_name: of its module; it knows no other model names than this and those of `adapters`.
    """

    name: str
    model: str | None
    argv: tuple[str, ...]
    environment: dict[str, str]
    url: str
    served_name: str
    adapters: tuple[str, ...] = ()

    def shell(self) -> str:
        """Return the command, quoted for a shell."""
        settings = [f"{key}={shlex.quote(value)}" for key, value in sorted(self.environment.items())]
        return " ".join(["env", *settings, shlex.join(self.argv)])


@dataclass(frozen=True)
class WorkerPlace:
    """What differs between two workers of a pool: their ports and GPUs."""

    port: int
    side_channel_port: int
    gpus: tuple[str, ...]


def plan_workers(cluster: Cluster, names: ServedNames, visible_gpus: str | None = None) -> list[WorkerCommand]:
    """Return commands for all workers that the cluster file gives as a number. Free ports are chosen now.

    Args:
        visible_gpus: CUDA_VISIBLE_DEVICES of the launcher, as a scheduler may set it; None: unset.
    Raises:
        QsunError: no pool has a number, one has a scale, or there are too few ports or visible GPUs.
    """
    served = {"decode": names.decode, "prefill": names.shared}
    served |= {f"models.{model}": name for model, name in names.prefill.items()}
    for where, pool in cluster.pools.items():
        if pool.scale is not None:
            raise QsunError(f"{where}.scale needs Ray; add --ray or drop it")
    launched = [(where, pool, pool.workers) for where, pool in cluster.pools.items() if isinstance(pool.workers, int)]
    if not launched:
        raise QsunError("no pool of the cluster has a number of workers to start; use `qsun route` for running workers")
    places = _places(cluster.launch, sum(count for *_, count in launched), visible_gpus)
    commands = []
    prefills = 0
    for where, pool, count in launched:
        model = where.removeprefix("models.") if where.startswith("models.") else None
        adapters = _adapters(cluster, names) if where == "prefill" else {}
        for index in range(count):
            name = f"decode-{index}" if where == "decode" else f"prefill-{prefills}-{_file_name(model or 'adapters')}"
            prefills += where != "decode"
            settings = (cluster.launch, next(places), adapters)
            commands.append(worker_command(name, model, pool.module, served[where], *settings))
    return commands


def _adapters(cluster: Cluster, names: ServedNames) -> dict[str, str]:
    """Return the directories of adapters by the names under which workers serve them."""
    return {names.prefill[model]: entry.adapter for model, entry in cluster.adapters.items()}


def worker_command(
    name: str,
    model: str | None,
    module: str,
    served: str,
    launch: LaunchSettings,
    place: WorkerPlace,
    adapters: Mapping[str, str] = MappingProxyType({}),
) -> WorkerCommand:
    """Return the command of one worker.

    Args:
        model: None for a decode worker, and for a prefill worker of adapters.
        adapters: their directories by served name.
    """
    directory = find_model(module).resolve()
    decode = model is None and not adapters
    argv = [
        *(launch.python or sys.executable, "-m", API_SERVER),
        *("--model", str(directory)),
        *("--served-model-name", served),
        *("--host", LOOPBACK, "--port", str(place.port)),
        *("--dtype", launch.dtype),
        *("--load-format", "safetensors"),
        *("--kv-transfer-config", json.dumps(kv_transfer_config(decode, launch.device))),
        *_sizes(launch),
        *(["--enforce-eager"] if launch.runs_eager else []),
        *(_lora_options(adapters, launch.max_loras) if adapters else []),
    ]
    if decode:
        # The prefix cache is keyed by tokens alone: one model would read KV blocks that another model's prefill wrote.
        argv.append("--no-enable-prefix-caching")
        if launch.kernels == "qsun":  # their environment has qsun
            argv += ["--middleware", KV_GUARD]
    if launch.kernels == "qsun" and read_json(directory / "config.json").get("quantization_config"):
        argv += ["--quantization", "qsun"]
    argv += launch.decode_arguments if decode else launch.prefill_arguments
    url = f"http://{LOOPBACK}:{place.port}"
    switch = {PREFILL_LORA: "1"} if adapters and launch.kernels == "qsun" else {}
    environment = switch | _environment(launch, place)
    return WorkerCommand(name, model, tuple(argv), environment, url, served, tuple(adapters))


def _lora_options(adapters: Mapping[str, str], most: int) -> Iterator[str]:
    """Yield vLLM's options for adapters that it loads at its start and holds in the memory of its host."""
    ranks = [read_json(Path(directory) / ADAPTER)["r"] for directory in adapters.values()]
    largest = next((rank for rank in _LORA_RANKS if rank >= max(ranks)), None)
    if largest is None:
        raise QsunError(
            f"an adapter has rank {max(ranks)}, and vLLM serves at most {_LORA_RANKS[-1]}; tune a smaller one"
        )
    yield from ("--enable-lora", "--max-lora-rank", str(largest))
    yield from ("--max-loras", str(min(most, len(adapters))), "--max-cpu-loras", str(len(adapters)))
    yield from ("--lora-modules", *(f"{name}={directory}" for name, directory in adapters.items()))


def kv_transfer_config(decode: bool, device: str) -> dict[str, Any]:
    """Return vLLM's --kv-transfer-config. Decode workers skip its handshake check, which refuses other model paths."""
    config: dict[str, Any] = {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_consumer" if decode else "kv_producer",
        "kv_buffer_device": device,
        "kv_load_failure_policy": "fail",
    }
    extra: dict[str, Any] = {"enforce_handshake_compat": False} if decode else {}
    if device == "cpu":
        extra["num_threads"] = 0  # no transfer threads beside the one that polls: cores are scarce
    return config | ({"kv_connector_extra_config": extra} if extra else {})


def _sizes(launch: LaunchSettings) -> Iterator[str]:
    for flag, value in (
        ("--max-model-len", launch.max_model_len),
        ("--max-num-seqs", launch.max_num_seqs),
        ("--kv-cache-memory-bytes", launch.kv_cache_memory_bytes),
        ("--gpu-memory-utilization", launch.gpu_memory_utilization),
        ("--tensor-parallel-size", launch.tensor_parallel_size if launch.tensor_parallel_size > 1 else None),
    ):
        if value is not None:
            yield flag
            yield str(value)


def _environment(launch: LaunchSettings, place: WorkerPlace) -> dict[str, str]:
    values = {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": LOOPBACK,
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(place.side_channel_port),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",  # modules are directories
    }
    if launch.device == "cpu":
        values |= {"OMP_NUM_THREADS": str(launch.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        if launch.tensor_parallel_size == 1:
            values["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one polling process less
    if place.gpus:
        values[_VISIBLE] = ",".join(place.gpus)
    # by default these listen on every network of the machine without authentication: NIXL's UCX, which serves the KV
    # cache, and the process groups of vLLM's ranks
    values |= dict.fromkeys(("UCX_NET_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), _LOOPBACK_DEVICE)
    return values | launch.environment


def _places(launch: LaunchSettings, count: int, visible_gpus: str | None) -> Iterator[WorkerPlace]:
    gpus = _gpus(launch, count, visible_gpus)
    if launch.first_port is None:
        ports: Sequence[int] = free_ports(2 * count)
    else:
        ports = range(launch.first_port, launch.first_port + 2 * count)
        if ports[-1] > _LARGEST_PORT:
            raise QsunError(f"launch.first_port {launch.first_port} leaves too few ports for {count} workers; lower it")
    for number in range(count):
        yield WorkerPlace(ports[2 * number], ports[2 * number + 1], gpus[number])


def _gpus(launch: LaunchSettings, count: int, visible: str | None) -> list[tuple[str, ...]]:
    """Return the GPUs of each worker, in order; a list in the file that is too short is used again from its start."""
    if launch.device == "cpu" or _VISIBLE in launch.environment:
        return [()] * count
    size = launch.tensor_parallel_size
    if launch.gpus is not None:
        known = [str(launch.gpus[i % len(launch.gpus)]) for i in range(count * size)]
    elif visible is None:
        known = [str(i) for i in range(count * size)]
    else:  # numbers or UUIDs; CUDA ignores everything after the first entry that is not a device
        known = list(takewhile(lambda entry: entry not in ("", "-1"), map(str.strip, visible.split(","))))
        if len(known) < count * size:
            raise QsunError(
                f"the workers need {count * size} GPUs, and {_VISIBLE}={visible} has {len(known)}; start fewer, "
                "make more visible, or list launch.gpus to share them"
            )
    return [tuple(known[number * size : (number + 1) * size]) for number in range(count)]


def free_ports(count: int) -> list[int]:
    """Return different free ports of the loopback address: all are bound before any is released."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for bound in sockets:
            bound.bind((LOOPBACK, 0))
        return [bound.getsockname()[1] for bound in sockets]


def _file_name(model: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", model)


def started_urls(commands: Sequence[WorkerCommand]) -> tuple[list[str], list[str], dict[str, list[str]]]:
    """Return the URLs of decode workers, of prefill workers of adapters, and of the others by model."""
    shared = [command.url for command in commands if command.adapters]
    decode = [command.url for command in commands if command.model is None and not command.adapters]
    models: dict[str, list[str]] = {}
    for command in commands:
        if command.model is not None:
            models.setdefault(command.model, []).append(command.url)
    return decode, shared, models
