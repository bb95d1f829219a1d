"""What Ray's path costs, and how long `qsun up` takes: python tests/serve/ray/live/costs.py [REPORT.json]

`qsun up` with a pretend prefill and decode replica, once with Serve's own way of calling replicas, once with its gRPC,
and once with events gathered. CPU microseconds of the ingress, Serve's proxy and the replicas for each token of a
stream and for each short request, under the load of tests/serve/relay_cost.py, whose figures for `qsun route` are
comparable; and the seconds from the command to the first token. CPU time only, but for these.
"""

import asyncio
import json
import os
import statistics
import sys
import time
from pathlib import Path

import httpx

from tests.serve.ray.live.nodes import temporary_root
from tests.serve.ray.rig import cluster_values, environment, make_modules, processes, started
from tests.serve.relay_cost import EVENT_SECONDS, GATHER_SECONDS, ROUNDS, SHORT, STREAMS, TICKS, TOKENS, relayed, short

ROLES = {
    "ingress": "ray::ServeReplica:qsun:",
    "proxy": "ray::ProxyActor",
    "prefill replica": "ray::ServeReplica:qsun-prefill-",
    "decode replica": "ray::ServeReplica:qsun-decode:",
}
WAYS = {
    "as it comes": ({}, 0.0),
    "gRPC": ({"RAY_SERVE_USE_GRPC_BY_DEFAULT": "1"}, 0.0),
    "gathered": ({}, GATHER_SECONDS),
}


def spent(root: Path, roles: dict[str, str]) -> dict[str, float]:
    """Return the CPU seconds of each role's processes. roles: how the names of these begin."""
    found = dict.fromkeys(roles, 0.0)
    for role, name in roles.items():
        for pid in processes(name):
            if f"TEST_ROOT={root}\0" in environment(pid):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                found[role] += (int(fields[11]) + int(fields[12])) / TICKS
    return found


def first_token(url: str) -> None:
    """Return once the first token of a stream is there."""
    body = {"model": "math", "prompt": "a b", "max_tokens": 4, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, trust_env=False, timeout=120) as answer:
        assert next(answer.iter_lines()).startswith("data: ")


def measured(root: Path, url: str, model: str, module: str, roles: dict[str, str]) -> dict:
    asyncio.run(relayed(url, model, module))  # which warms connections up
    found: dict[str, dict] = {}
    for what, load, count in (("token", relayed, STREAMS * TOKENS), ("request", short, SHORT)):
        rounds = []
        for _ in range(ROUNDS):
            before = spent(root, roles)
            asyncio.run(load(url, model, module))
            rounds.append({role: 1e6 * (now - before[role]) / count for role, now in spent(root, roles).items()})
        medians = {role: round(statistics.median(one[role] for one in rounds)) for role in roles}
        found[f"microseconds a {what}"] = medians | {"rounds": [round(sum(one.values())) for one in rounds]}
    return found


def run(root: Path, settings: dict[str, str], gather_seconds: float) -> dict:
    make_modules(root)
    values = cluster_values(root, token_seconds=EVENT_SECONDS)
    values["limits"]["gather_seconds"] = gather_seconds
    values["decode"]["workers"], values["models"] = 1, {"math": values["models"]["math"]}
    os.environ |= settings
    began = time.monotonic()
    with started(root, values) as up:
        line = up.stdout.readline()
        assert line, up.said()[-4000:]
        url = json.loads(line)["url"]
        first_token(url)
        seconds = time.monotonic() - began
        return {"seconds to the first token": round(seconds, 1)} | measured(root, url, "math", "math", ROLES)


def main() -> None:
    found = {}
    for way, (settings, gather_seconds) in WAYS.items():
        with temporary_root() as root:
            found[way] = run(root, settings, gather_seconds) | {"load_average": round(os.getloadavg()[0], 1)}
        print(way, json.dumps(found[way]), flush=True)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
