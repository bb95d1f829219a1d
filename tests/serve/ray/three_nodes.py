"""Three Ray nodes on this machine under load: python tests/serve/ray/three_nodes.py [REPORT.json] [--vllm PYTHON]

Two full modules, each with a prefill replica, and four adapters that share one; three decode replicas for all of them.
Decode replicas, prefill replicas and a node are killed while 64 requests run; a module is replaced; the decode pool
grows from 1 to 3 replicas and shrinks again. Requests are right, or end with an error that says so, and where nothing
is killed none may fail. Exit code 1 where that is not so. Prints what happened and how long it took.

Replicas are pretend vLLMs. --vllm: real ones, in float32 on the CPU, of the environment with this interpreter
(.oracles/vllm/bin/python, which tests/vllm/run.sh makes); their tokens are compared with those of `qsun.generate`.
--scaling-only: only the last of these.
"""

import argparse
import asyncio
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from tests.serve.ray.live.fleets import START_SECONDS, UPDATED, PretendFleet, RealFleet, environment
from tests.serve.ray.live.load import Load, many
from tests.serve.ray.live.nodes import DECODE, Nodes, temporary_root, three_nodes
from tests.serve.ray.rig import engines, kill, ready, until, warm

PAIRS = 3 * 3
ENGINES = 3 + 3
EVERY = 0.5  # seconds
AT_ONCE, LIGHT = 64, 2  # requests in flight: before an event, and until all replicas are back
CLEAR = {"right", "cut off", "status 502", "status 503", "status 504"}
UNHARMED = ("nothing killed", "module replaced", "scaling")

Fleet = PretendFleet | RealFleet


class ThreeNodes:
    """The phases; `found` is what they find."""

    def __init__(self, nodes: Nodes, fleet: Fleet):
        self.nodes, self.fleet, self.root = nodes, fleet, nodes.root
        self.found: dict[str, dict] = {}

    def run(self, scaling_only: bool) -> None:
        if not scaling_only:
            self.start()
            for event in (
                self.a_decode_engine, self.a_decode_replica, self.a_prefill_replica,
                self.the_prefill_replica_of_adapters, self.a_node,
            ):  # fmt: skip
                self.killed(event)
            self.module_replaced()
        self.scaling()

    def note(self, name: str, part: dict) -> None:
        self.found[name] = part | {"load_average": round(os.getloadavg()[0], 1)}
        print(name, json.dumps(self.found[name]), flush=True)

    def deploy(self, **decode) -> None:
        values = self.fleet.values()
        values["decode"] = {"module": values["decode"]["module"]} | decode
        self.nodes.deploy(values)

    def start(self) -> None:
        self.deploy(workers=3)
        seconds = until(lambda: warm(self.nodes.url, PAIRS), START_SECONDS, EVERY)
        self.note("warm", {"seconds": round(seconds, 1), "ended": {}})
        began = time.monotonic()
        ended = self.asked(4 * AT_ONCE)
        rate = 4 * AT_ONCE * self.fleet.tokens / (time.monotonic() - began)
        self.note("nothing killed", {"ended": ended, "tokens_a_second": round(rate)})

    def asked(self, count: int = AT_ONCE) -> dict[str, int]:
        return dict(asyncio.run(many(self.nodes.url, map(self.fleet.question, range(count)), AT_ONCE)))

    def all_back(self) -> bool:
        return warm(self.nodes.url, PAIRS) and len(engines(self.root)) == ENGINES

    def killed(self, event: Callable[[], None]) -> None:
        def lost_and_back() -> None:
            until(lambda: not self.all_back())
            until(self.all_back, START_SECONDS, EVERY)

        part = asyncio.run(self.under_load(event, lost_and_back))
        self.note(f"{event.__name__.replace('_', ' ')} killed", part | {"after": self.asked()})

    async def under_load(self, event: Callable[[], None], over: Callable[[], None]) -> dict:
        """Run an event under load. Return how requests ended, and the seconds from the event until it was over."""
        load = Load(self.nodes.url, self.fleet.question, AT_ONCE)
        load.start()
        while load.ended.total() < AT_ONCE // 2:
            await asyncio.sleep(0.05)
        began = time.monotonic()
        await asyncio.to_thread(event)
        load.at_once = LIGHT
        await asyncio.to_thread(over)
        seconds = time.monotonic() - began
        await load.stop()
        return {"ended": dict(load.ended), "seconds_until_back": round(seconds, 1)}

    def a_decode_engine(self) -> None:
        kill(engines(self.root, "decode")[0])

    def a_decode_replica(self) -> None:
        kill(self.nodes.replicas(DECODE)[0])

    def a_prefill_replica(self) -> None:
        kill(self.nodes.replicas("ray::ServeReplica:qsun-prefill-math-")[0])

    def the_prefill_replica_of_adapters(self) -> None:
        kill(self.nodes.replicas("ray::ServeReplica:qsun-prefill:")[0])

    def a_node(self) -> None:
        self.nodes.kill_one_with_decode()

    def module_replaced(self) -> None:
        """A module is replaced: nothing fails, and the decode replicas are the same ones."""
        before, old = sorted(self.nodes.replicas(DECODE)), self.workers_of_math()
        self.fleet.accepted["math"] += (UPDATED,)

        def over() -> None:
            until(lambda: self.workers_of_math() and not self.workers_of_math() & old, START_SECONDS, EVERY)
            until(lambda: warm(self.nodes.url, PAIRS), START_SECONDS, EVERY)

        part = asyncio.run(self.under_load(lambda: self.deploy(workers=3), over))
        self.fleet.accepted["math"] = (UPDATED,)
        part["same decode replicas"] = sorted(self.nodes.replicas(DECODE)) == before
        self.note("module replaced", part | {"after": self.asked()})

    def workers_of_math(self) -> set[str]:
        state = ready(self.nodes.url) or {"workers": ()}
        return {worker["url"] for worker in state["workers"] if worker["model"] == "math"}

    def scaling(self) -> None:
        """The decode pool grows to 3 replicas under load and shrinks to 1 under a light one."""
        scale = {"workers": 3, "tokens": self.fleet.scale_tokens, "up_seconds": 2.0, "down_seconds": 20.0}
        self.deploy(workers=1, scale=scale)
        until(lambda: warm(self.nodes.url, 3) and len(self.nodes.decode_workers()) == 1, START_SECONDS, EVERY)
        self.note("scaling", asyncio.run(self.grown_and_shrunk()))

    async def grown_and_shrunk(self) -> dict:
        load, counts = Load(self.nodes.url, self.fleet.question, AT_ONCE), [1]

        def seen(wanted: int) -> bool:
            count = sum(worker["state"] == "ready" for worker in self.nodes.decode_workers())
            if count and count != counts[-1]:
                counts.append(count)
            return count == wanted

        load.start()
        until_three = await asyncio.to_thread(until, lambda: seen(3), START_SECONDS, EVERY)
        load.at_once = 2
        until_one = await asyncio.to_thread(until, lambda: seen(1), START_SECONDS, EVERY)
        await asyncio.sleep(2.0)
        await load.stop()
        times = {"seconds_to_3": round(until_three, 1), "seconds_to_1": round(until_one, 1)}
        return {"ended": dict(load.ended), "replicas_seen": counts} | times


def faults(found: dict[str, dict]) -> list[str]:
    """Return the phases in which a request was lost."""
    lost = [name for name, part in found.items() if not set(part["ended"]) <= CLEAR]
    lost += [name for name in UNHARMED if name in found and set(found[name]["ended"]) != {"right"}]
    return lost + [f"after {name}" for name, part in found.items() if set(part.get("after", ["right"])) != {"right"}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", nargs="?", type=Path)
    parser.add_argument("--vllm", type=Path)
    parser.add_argument("--scaling-only", action="store_true")
    chosen = parser.parse_args()
    with temporary_root() as root:
        os.environ |= environment(root)
        fleet = PretendFleet(root) if chosen.vllm is None else RealFleet(root, chosen.vllm.absolute())
        with three_nodes(root) as nodes:
            phases = ThreeNodes(nodes, fleet)
            try:
                phases.run(chosen.scaling_only)
            finally:
                if chosen.report:
                    chosen.report.write_text(json.dumps(phases.found, indent=1) + "\n")
    if lost := faults(phases.found):
        raise SystemExit(f"requests were lost: {', '.join(lost)}")


if __name__ == "__main__":
    main()
