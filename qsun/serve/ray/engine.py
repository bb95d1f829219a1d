"""A replica's vLLM server: its command on this node, its process, and whether its module is the planned one."""

import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

from qsun.errors import QsunError
from qsun.model.checkpoint import Checkpoint
from qsun.model.locate import find_model
from qsun.serve.cluster.names import served_name
from qsun.serve.cluster.schema import LaunchSettings
from qsun.serve.launch.plan import WorkerCommand, WorkerPlace, free_ports, worker_command
from qsun.serve.launch.processes import WorkerProcesses, last_lines
from qsun.serve.ray.logs import drop_old_logs, hold_log, log_directory
from qsun.serve.ray.plan import LOOPBACK_DEVICE, pool_app

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2


def engine_command(engine: Mapping[str, Any], replica: str, node_address: str) -> WorkerCommand:
    """Return the command of a replica's vLLM on this node, with free ports.

    Args:
        engine: its arguments, as `plan_apps` makes them. replica: its id. node_address: where other nodes reach it.
    Raises:
        QsunError: the module on this node is missing, or another one than was planned.
    """
    directory = find_model(engine["module"])
    found = served_name(Checkpoint(directory).fingerprint())
    if found != engine["served_name"]:
        raise QsunError(
            f"{directory} on this node is {found} and not {engine['served_name']}; give every node the same files"
        )
    launch = LaunchSettings(**engine["launch"])
    settings = _transfer_settings(engine["transfer_device"], node_address) | launch.environment
    launch = launch.model_copy(update={"environment": settings})
    port, side_channel = free_ports(2)
    name = f"{pool_app(engine['model']).removeprefix('qsun-')}-{replica}"
    place = WorkerPlace(port, side_channel, ())  # Ray makes the replica's GPUs the visible ones
    return worker_command(name, engine["model"], engine["module"], found, launch, place)


def _transfer_settings(device: str, node_address: str) -> dict[str, str]:
    if device == LOOPBACK_DEVICE:
        return {}
    return {"UCX_NET_DEVICES": device, "VLLM_NIXL_SIDE_CHANNEL_HOST": node_address}


class EngineProcess:
    """A vLLM server, started and ready.

    Args:
        command: its command. logs: directory for its log; None: the default one. seconds: until it must answer.
        on_death: called, in a thread, with a line that says how it ended if it ends by itself.
    Attributes:
        url: on the loopback address.
    Raises:
        QsunError: its log cannot be written, it ended, with the last lines of its log, or it does not answer in time.
    """

    def __init__(self, command: WorkerCommand, logs: str | None, seconds: float, on_death: Callable[[str], None]):
        directory = log_directory(logs)
        log = directory / f"{command.name}.log"
        self.url = command.url
        self._log = hold_log(log)
        drop_old_logs(directory, command.name.rpartition("-")[0])
        self._processes = WorkerProcesses([command], directory, _environment())
        self._on_death = on_death
        self._processes.__enter__()
        try:
            self._processes.wait_until_ready(seconds, logger.info)
        except BaseException as error:
            lines = "\n".join(last_lines(log))
            self._processes.stop()
            self._log.close()
            raise QsunError(f"{error}\n{lines}") from None
        self._ending = threading.Event()
        threading.Thread(target=self._watch, name="watch vLLM", daemon=True).start()

    def stop(self) -> None:
        """End it. Blocks until it is gone."""
        self._ending.set()
        self._processes.stop()
        self._log.close()

    def _watch(self) -> None:
        while not self._ending.wait(_POLL_SECONDS):
            for worker in self._processes.newly_dead():
                for line in last_lines(worker.log):
                    logger.error("    %s", line)
                self._on_death(worker.death())
                return


def _environment() -> dict[str, str]:
    """Return the replica's own environment, in which Ray has set the GPUs."""
    return dict(os.environ)
