"""Three Ray nodes on this machine under load: python tests/serve/ray/three_nodes.py [REPORT.json]

Pretend vLLMs; two full modules, each with a prefill replica, and four adapters that share one. Decode replicas, prefill
replicas and a node are killed while requests run; the decode pool grows from 1 to 3 replicas and shrinks again; a
module is replaced. Requests are right, or end with an error that says so, and where nothing is killed none may fail.
Exit code 1 where that is not so. Prints what happened and how long it took.
"""

import asyncio
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
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
from tests.places import ROOT
from tests.serve.ray.rig import (
    MODELS,
    cluster_values,
    engines,
    kill,
    make_adapters,
    make_modules,
    many,
    processes,
    ready,
    until,
    warm,
)

START_SECONDS = 900
ADAPTERS = ("poem", "tool", "chat", "sql")
ALL = (*MODELS, *ADAPTERS)
PAIRS = 3 * 3
ENGINES = 3 + 3
CLEAR = {"right", "cut off", "status 502", "status 503", "status 504"}
DECODE = "ray::ServeReplica:qsun-decode"


class Nodes:
    """A Ray cluster of a head, which clients and the ingress use, and two more nodes."""

    def __init__(self, root):
        self.root, self.checks = root, ModuleChecks()
        port, self.http_port = free_ports(2)
        head = {"num_cpus": 8, "resources": {"head": 1}, "include_dashboard": True, "dashboard_port": port}
        self.cluster = patiently(lambda: Cluster(initialize_head=True, connect=True, head_node_args=head))
        self.adapters = make_adapters(root / "adapters", ADAPTERS)
        self.workers = [patiently(lambda: self.cluster.add_node(num_cpus=8)) for _ in range(2)]
        self.dashboard, self.url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{self.http_port}"

    def deploy(self, math="math", **changes):
        """math: directory of this model's module."""
        values = cluster_values(self.root, token_seconds=0.02, listen={"port": self.http_port})
        values["prefill"] = {"module": "demo", "workers": 1}
        values["models"]["math"]["module"] = str(self.root / math)
        values["models"] |= self.adapters
        values["ray"]["surge_percent"] = 100
        values["launch"]["start_seconds"] = float(START_SECONDS)
        cluster = parse_cluster(values | changes)
        planned = plan_apps(cluster, self.checks.names(cluster))
        planned[-1].args["deployment"]["ray_actor_options"]["resources"] = {"head": 0.1}
        config = serve_config(cluster, planned) | {"proxy_location": "HeadOnly"}  # nodes share an address here
        put_config(self.dashboard, config, None)

    def decode_replicas(self):
        state = ready(self.url)
        return [] if state is None else [w for w in state["workers"] if w["role"] == "decode"]

    def node_with_decode(self):
        """A node that is not the head and has a decode replica."""
        for node in self.workers:
            raylet = node.all_processes["raylet"][0].process.pid
            if any(parent(pid) == raylet for pid in processes(DECODE)):
                return node
        raise AssertionError("every decode replica is on the head")

    def remove(self, node):
        self.workers.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)


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


def parent(pid):
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


@contextmanager
def three_nodes():
    root = Path(tempfile.mkdtemp(prefix="qsun-ray-"))
    make_modules(root)
    nodes = Nodes(root)
    try:
        yield nodes
    finally:
        serve.shutdown()
        ray.shutdown()
        nodes.cluster.shutdown()
        shutil.rmtree(root, ignore_errors=True)


async def under_load(nodes, event, requests=192, tokens=30, at_once=48):
    """Run an event in the middle of a load. Return how requests ended, and the seconds from the event to `back`."""
    load = asyncio.ensure_future(many(nodes.url, range(requests), tokens, at_once, ALL))
    await asyncio.sleep(1.0)
    started = time.monotonic()
    back = await asyncio.to_thread(event)
    seconds = await asyncio.to_thread(until, back, START_SECONDS)
    ended = await load
    return {"ended": dict(ended), "seconds_until_back": round(seconds, 1), "at": round(time.monotonic() - started, 1)}


def kills(nodes, found):
    nodes.deploy(decode={"module": "demo", "workers": 3})
    started = time.monotonic()
    until(lambda: warm(nodes.url, PAIRS), START_SECONDS)
    found["seconds_to_warm"] = round(time.monotonic() - started, 1)

    def back():
        return warm(nodes.url, PAIRS) and len(engines(nodes.root)) == ENGINES

    def a_decode_engine():
        kill(engines(nodes.root, "decode")[0])
        until(lambda: not back())
        return back

    def a_decode_replica():
        kill(processes(DECODE)[0])
        until(lambda: not back())
        return back

    def a_prefill_replica():
        kill(processes("ray::ServeReplica:qsun-prefill-math-")[0])
        until(lambda: not back())
        return back

    def the_prefill_replica_of_adapters():
        kill(processes("ray::ServeReplica:qsun-prefill:")[0])
        until(lambda: not back())
        return back

    def a_node():
        nodes.remove(nodes.node_with_decode())
        until(lambda: not back())
        return back

    found["no kill"] = {"ended": dict(asyncio.run(many(nodes.url, range(192), 30, 48, ALL)))}
    for event in (a_decode_engine, a_decode_replica, a_prefill_replica, the_prefill_replica_of_adapters, a_node):
        name = event.__name__.replace("_", " ")
        found[f"{name} killed"] = asyncio.run(under_load(nodes, event))
        print(name, found[f"{name} killed"], flush=True)


def new_module(nodes, found):
    """A module is replaced under load: nothing fails, and the decode replicas are the same ones."""
    before = sorted(processes(DECODE))
    (nodes.root / "new").mkdir()
    shutil.copytree(nodes.root / "code", nodes.root / "new" / "math")
    old = {w["url"] for w in ready(nodes.url)["workers"] if w["model"] == "math"}

    def replaced():
        state = ready(nodes.url)
        now = {w["url"] for w in state["workers"] if w["model"] == "math"} if state else old
        return bool(now) and not now & old and state["ready"]

    def event():
        nodes.deploy(math="new/math", decode={"module": "demo", "workers": 3})
        return replaced

    found["module replaced"] = asyncio.run(under_load(nodes, event, requests=768))
    found["module replaced"]["same decode replicas"] = sorted(processes(DECODE)) == before


def scaling(nodes, found):
    """The decode pool grows to 3 replicas under load and shrinks to 1 under a light one."""
    scale = {"workers": 3, "tokens": 400, "up_seconds": 2.0, "down_seconds": 4.0}
    nodes.deploy(decode={"module": "demo", "workers": 1, "scale": scale})
    until(lambda: warm(nodes.url, 3) and len(nodes.decode_replicas()) == 1, START_SECONDS)
    ended, counts, until_three, until_one = asyncio.run(grown_and_shrunk(nodes))
    found["scaling"] = {
        "ended": dict(ended),
        "replicas_seen": counts,
        "seconds_to_3": round(until_three, 1),
        "seconds_to_1": round(until_one, 1),
    }


async def grown_and_shrunk(nodes):
    ended, counts, heavy = Counter(), [1], True

    async def load():
        number = 0
        while heavy is not None:
            count = 64 if heavy else 2
            ended.update(await many(nodes.url, range(number, number + count), 30, count, ALL))
            number += count

    def seen(wanted):
        count = sum(worker["state"] == "ready" for worker in nodes.decode_replicas())
        if count and count != counts[-1]:
            counts.append(count)
        return count == wanted

    running = asyncio.ensure_future(load())
    until_three = await asyncio.to_thread(until, lambda: seen(3), START_SECONDS)
    heavy = False
    until_one = await asyncio.to_thread(until, lambda: seen(1), START_SECONDS)
    await asyncio.sleep(2.0)
    heavy = None
    await running
    return ended, counts, until_three, until_one


def main():
    os.environ |= {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    found = {}
    with three_nodes() as nodes:
        for phase in (kills, new_module, scaling):
            phase(nodes, found)
            print(json.dumps(found), flush=True)
    text = json.dumps(found, indent=1)
    print(text)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text + "\n")
    faults = [name for name, part in found.items() if isinstance(part, dict) and not set(part["ended"]) <= CLEAR]
    faults += [name for name in ("no kill", "module replaced", "scaling") if set(found[name]["ended"]) != {"right"}]
    if faults:
        sys.exit(f"requests were lost: {', '.join(faults)}")


if __name__ == "__main__":
    main()
