"""A Ray cluster of three nodes on this machine, and the applications of a cluster file on it."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray import serve
from ray.cluster_utils import Cluster

from qsun.serve.cluster.file import parse_cluster
from qsun.serve.cluster.modules import ModuleChecks
from qsun.serve.ray.config import put_config, serve_config
from qsun.serve.ray.engine.command import free_ports
from qsun.serve.ray.plan import plan_apps
from tests.serve.ray.rig import environment, processes, ready

DECODE = "ray::ServeReplica:qsun-decode:"
CPUS = 8  # that Ray counts on each node


class Nodes:
    """A head, which clients and the ingress use, and two more nodes. root: in the environment of every process."""

    def __init__(self, root: Path):
        self.root, self._checks = root, ModuleChecks()
        port, self._http_port = free_ports(2)
        head = {"num_cpus": CPUS, "resources": {"head": 1}, "include_dashboard": True, "dashboard_port": port}
        self._cluster = patiently(lambda: Cluster(initialize_head=True, connect=True, head_node_args=head))
        self._others = [patiently(lambda: self._cluster.add_node(num_cpus=CPUS)) for _ in range(2)]
        self._dashboard, self.url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{self._http_port}"

    def deploy(self, values: dict) -> None:
        """Deploy a cluster file's values; replicas of new modules start before old ones stop."""
        values |= {"listen": {"port": self._http_port}, "ray": values["ray"] | {"surge_percent": 100}}
        cluster = parse_cluster(values)
        planned = plan_apps(cluster, self._checks.names(cluster))
        planned[-1].args["deployment"]["ray_actor_options"]["resources"] = {"head": 0.1}
        config = serve_config(cluster, planned) | {"proxy_location": "HeadOnly"}  # nodes share an address here
        put_config(self._dashboard, config, None)

    def replicas(self, name: str) -> list[int]:
        """Return the pids of the actors whose process names begin like this."""
        return [pid for pid in processes(name) if f"TEST_ROOT={self.root}\0" in environment(pid)]

    def decode_workers(self) -> list[dict]:
        """Return what /ready says of the decode replicas."""
        state = ready(self.url)
        return [] if state is None else [w for w in state["workers"] if w["role"] == "decode"]

    def kill_one_with_decode(self) -> None:
        """Kill a node that is not the head and has a decode replica, with all that runs there."""
        parents = {parent(pid) for pid in self.replicas(DECODE)}
        for node in self._others:
            if node.all_processes["raylet"][0].process.pid in parents:
                self._others.remove(node)
                self._cluster.remove_node(node, allow_graceful=False)
                return
        raise AssertionError("every decode replica is on the head")

    def shut_down(self) -> None:
        serve.shutdown()
        ray.shutdown()
        self._cluster.shutdown()


def patiently(start):
    """Start a node. Ray gives up after 30 s, which is little on a machine that other work keeps busy."""
    for attempt in range(5):
        try:
            return start()
        except Exception as error:
            if attempt == 4 or "timed out during startup" not in str(error):
                raise
            print("a node takes long to start; once more", flush=True)
    return None


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


@contextmanager
def temporary_root() -> Iterator[Path]:
    root = Path(tempfile.mkdtemp(prefix="qsun-ray-"))
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


@contextmanager
def three_nodes(root: Path) -> Iterator[Nodes]:
    nodes = Nodes(root)
    try:
        yield nodes
    finally:
        nodes.shut_down()
