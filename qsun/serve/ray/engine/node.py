"""A replica's vLLM server on the node that it was placed on: its command, if the modules there are the planned ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsun.errors import QsunError
from qsun.model.checkpoint import Checkpoint
from qsun.model.locate import find_model
from qsun.model.lora import adapter_fingerprint
from qsun.serve.cluster.names import served_name
from qsun.serve.cluster.schema import LaunchSettings
from qsun.serve.ray.engine.command import LOOPBACK_DEVICE, EngineCommand, EngineModule, engine_command, free_ports


def command_on_node(engine: Mapping[str, Any], replica: str, node_address: str) -> EngineCommand:
    """Return the command of a replica's vLLM on this node, with free ports.

    Args:
        engine: its arguments, as `plan_apps` makes them. replica: its id. node_address: where other nodes reach it.
    Raises:
        QsunError: a module or adapter on this node is missing, or another one than was planned.
    """
    directory = find_model(engine["module"])
    _check(directory, Checkpoint(directory).fingerprint(), engine["served_name"])
    adapters = {planned["served_name"]: planned["directory"] for planned in engine["adapters"].values()}
    for name, adapter in adapters.items():
        if not Path(adapter).is_dir():
            raise QsunError(f"{adapter} is not on this node; give every node the same files")
        _check(Path(adapter), adapter_fingerprint(Path(adapter)), name)
    launch = LaunchSettings(**engine["launch"])
    settings = _transfer_settings(engine["transfer_device"], node_address) | launch.environment
    port, side_channel = free_ports(2)
    return engine_command(
        f"{engine['pool']}-{replica}",
        engine["role"],
        EngineModule(engine["module"], engine["served_name"], adapters),
        launch.model_copy(update={"environment": settings}),
        (port, side_channel),
        engine["max_tokens"],
        engine["deadline_seconds"],
    )


def _check(directory: Path, fingerprint: str, planned: str) -> None:
    found = served_name(fingerprint)
    if found != planned:
        raise QsunError(f"{directory} on this node is {found} and not {planned}; give every node the same files")


def _transfer_settings(device: str, node_address: str) -> dict[str, str]:
    if device == LOOPBACK_DEVICE:
        return {}
    return {"UCX_NET_DEVICES": device, "VLLM_NIXL_SIDE_CHANNEL_HOST": node_address}
