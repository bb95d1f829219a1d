"""The command and environment of a replica's vLLM server, decided before it runs."""

import json
import math
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qsun.errors import QsunError
from qsun.model.checkpoint import read_json
from qsun.model.locate import find_model
from qsun.model.pairing import ADAPTER
from qsun.serve.cluster.schema import LaunchSettings, RequestLimits
from qsun.serve.router.workers.worker import Role

LOOPBACK = "127.0.0.1"
LOOPBACK_DEVICE = "lo"  # its name on Linux, the only system on which vLLM runs workers
API_SERVER = "vllm.entrypoints.openai.api_server"
KV_GUARD = "qsun.vllm.kv_guard.RequireKvCache"
LORA_GUARD = "qsun.vllm.lora_guard.RequirePrefillLora"
PREFILL_LORA = "QSUN_PREFILL_LORA"  # the switch of qsun/vllm/prefill_lora.py
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's --max-lora-rank takes


@dataclass(frozen=True)
class EngineCommand:
    """A vLLM server to start.

    Attributes:
        name: of its log; valid as a file name.
        argv: the whole command. environment: variables to add to the replica's own.
        url: its address. served_name: of its module; it knows no other model names than this and those of `adapters`.
    """

    name: str
    argv: tuple[str, ...]
    environment: dict[str, str]
    url: str
    served_name: str
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True)
class EngineModule:
    """What a server serves.

    Attributes:
        directory: of the module, or "demo". served_name: of it.
        adapters: directories of adapters on it, by served name.
    """

    directory: str
    served_name: str
    adapters: Mapping[str, str] = field(default_factory=dict)


def engine_command(
    name: str,
    role: Role,
    module: EngineModule,
    launch: LaunchSettings,
    ports: tuple[int, int],
    max_tokens: int | None = None,
    deadline_seconds: float = RequestLimits().deadline_seconds,
) -> EngineCommand:
    """Return the command of one server.

    Args:
        ports: of its API and of NIXL's side channel, on the loopback address.
        max_tokens: that no answer exceeds; None: as many as there is room for.
        deadline_seconds: of every request.
    Raises:
        QsunError: an adapter's rank is more than vLLM serves.
    """
    directory = find_model(module.directory).resolve()
    argv = [
        *(launch.python or sys.executable, "-m", API_SERVER),
        *("--model", str(directory)),
        *("--served-model-name", module.served_name),
        *("--host", LOOPBACK, "--port", str(ports[0])),
        *("--dtype", launch.dtype),
        *("--load-format", "safetensors"),
        *(_kv_options(role, launch, deadline_seconds)),
        *_sizes(launch),
        *(_speculation(launch.speculate) if launch.speculate and role != "prefill" else []),
        *(["--enforce-eager"] if launch.runs_eager else []),
        *(_lora_options(module.adapters, launch.max_loras) if module.adapters else []),
        *(["--override-generation-config", json.dumps({"max_new_tokens": max_tokens})] if max_tokens else []),
    ]
    if launch.kernels == "qsun" and read_json(directory / "config.json").get("quantization_config"):
        argv += ["--quantization", "qsun"]
    argv += launch.prefill_arguments if role == "prefill" else launch.decode_arguments
    switch = {PREFILL_LORA: "1"} if module.adapters and launch.kernels == "qsun" else {}
    environment = switch | _environment(launch, ports[1])
    url = f"http://{LOOPBACK}:{ports[0]}"
    return EngineCommand(name, tuple(argv), environment, url, module.served_name, tuple(module.adapters))


def _kv_options(role: Role, launch: LaunchSettings, deadline_seconds: float) -> Iterator[str]:
    if role == "aggregated":
        yield from ("--middleware", LORA_GUARD)
        return
    yield from ("--kv-transfer-config", json.dumps(kv_transfer_config(role, launch.device, deadline_seconds)))
    if role == "decode":
        # The prefix cache is keyed by tokens alone: one model would read KV blocks that another model's prefill wrote.
        yield "--no-enable-prefix-caching"
        if launch.kernels == "qsun":  # their environment has qsun
            yield from ("--middleware", KV_GUARD)


def _speculation(tokens: int) -> Iterator[str]:
    """Yield vLLM's option for drafts of so many tokens: what followed the last 2 to 4 tokens before."""
    matched = {"prompt_lookup_min": 2, "prompt_lookup_max": 4}
    yield from ("--speculative-config", json.dumps({"method": "ngram", "num_speculative_tokens": tokens} | matched))


def _lora_options(adapters: Mapping[str, str], most: int) -> Iterator[str]:
    """Yield vLLM's options for adapters that it loads at its start and holds in the memory of its host."""
    configs = [read_json(Path(directory) / ADAPTER) for directory in adapters.values()]
    ranks = [config["r"] for config in configs]
    largest = next((rank for rank in _LORA_RANKS if rank >= max(ranks)), None)
    if largest is None:
        raise QsunError(
            f"an adapter has rank {max(ranks)}, and vLLM serves at most {_LORA_RANKS[-1]}; tune a smaller one"
        )
    yield from ("--enable-lora", "--max-lora-rank", str(largest))
    yield from ("--max-loras", str(min(most, len(adapters))), "--max-cpu-loras", str(len(adapters)))
    targets = [names for config in configs if isinstance(names := config.get("target_modules"), list)]
    if len(targets) == len(configs):
        # otherwise vLLM holds products for the embedding and the head as well, and refuses a large vocabulary
        layers = {name.rpartition(".")[2] for names in targets for name in names}
        yield from ("--lora-target-modules", *sorted(layers))
    yield from ("--lora-modules", *(f"{name}={directory}" for name, directory in adapters.items()))


def kv_transfer_config(
    role: Role, device: str, deadline_seconds: float = RequestLimits().deadline_seconds
) -> dict[str, Any]:
    """Return vLLM's --kv-transfer-config. Decode servers skip its handshake check, which refuses other model paths.

    A prefill server's lease on KV blocks lasts as long as a request may. vLLM gives them to another request once its
    lease has ended, and a decode server that reads them later answers from that one's KV cache.
    """
    config: dict[str, Any] = {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_consumer" if role == "decode" else "kv_producer",
        "kv_buffer_device": device,
        "kv_load_failure_policy": "fail",
    }
    extra: dict[str, Any] = {"kv_lease_duration": math.ceil(deadline_seconds)}
    if role == "decode":
        extra["enforce_handshake_compat"] = False
    if device == "cpu":
        extra["num_threads"] = 0  # no transfer threads beside the one that polls: cores are scarce
    return config | {"kv_connector_extra_config": extra}


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


def _environment(launch: LaunchSettings, side_channel_port: int) -> dict[str, str]:
    values = {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": LOOPBACK,
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_channel_port),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",  # modules are directories
    }
    if launch.device == "cpu":
        values |= {"OMP_NUM_THREADS": str(launch.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        if launch.tensor_parallel_size == 1:
            values["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one polling process less
    # by default these listen on every network of the machine without authentication: NIXL's UCX, which serves the KV
    # cache, and the process groups of vLLM's ranks
    values |= dict.fromkeys(("UCX_NET_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), LOOPBACK_DEVICE)
    return values | launch.environment


def free_ports(count: int) -> list[int]:
    """Return different free ports of the loopback address: all are bound before any is released."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for bound in sockets:
            bound.bind((LOOPBACK, 0))
        return [bound.getsockname()[1] for bound in sockets]
