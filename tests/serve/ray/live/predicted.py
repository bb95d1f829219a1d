"""The simulator beside what three nodes do: python tests/serve/ray/live/predicted.py [REPORT.json]

The engines are pretend ones whose prompts and decode steps take set times (steps.py); routing, transfers, Ray and the
ingress are real. The same requests, at the times when they were sent, go through qsun's simulator with the same
times. Two loads: Poisson arrivals, and a burst that fills every batch. Exit code 1 where throughput or the mean TPOT is
off by more than 15%.
"""

import asyncio
import dataclasses
import json
import math
import os
import statistics
import sys
from pathlib import Path

from qsun.eval.load.client import PlannedRequest, Record, Target
from qsun.eval.load.generator import open_loop
from qsun.eval.load.plan import Pieces, PromptSource, plan_requests
from qsun.eval.load.workload import Lengths, TracedRequest, Workload
from qsun.eval.simulate.curves import Curves
from qsun.eval.simulate.simulation import simulate
from qsun.eval.simulate.system import DecodeWorker, System
from tests.serve.ray.live.fleets import ADAPTERS, ALL, START_SECONDS, PretendFleet, environment
from tests.serve.ray.live.nodes import temporary_root, three_nodes
from tests.serve.ray.live.steps import Times
from tests.serve.ray.rig import MODELS, until, warm

TIMES = Times(step=0.5, row=0.05, most_rows=12, prefill=0.25, prompt_token=0.01)  # slow, as Ray's path needs the cores
DECODE_WORKERS, PAIRS = 3, 9
POOL = "adapters"  # all of them, for the simulator: they share a prefill worker
LOADS = {"Poisson arrivals": 0.4, "a burst": math.inf}  # requests a second
REQUESTS, MOST_OFF = 60, 0.15
WORKLOAD = Workload(ALL, 0.0, Lengths.parse("uniform:8-64"), Lengths.parse("uniform:16-48"))


def quiet(*_: object) -> None:
    """Report no progress."""


def planned(name: str) -> list[PlannedRequest]:
    return plan_requests(WORKLOAD, PromptSource("completions", Pieces(0.0, 1.0)), LOADS[name], REQUESTS, 0, name)


async def measured(url: str, name: str) -> list[Record]:
    records = await open_loop(Target(url, deadline_s=600.0), planned(name), 2 * REQUESTS, quiet)
    assert not any(record.error for record in records), [record.error for record in records if record.error]
    return records


def trace(records: list[Record]) -> list[TracedRequest]:
    found = [
        TracedRequest(r.sent, POOL if r.model in ADAPTERS else r.model, r.prompt_tokens, r.output_tokens)
        for r in records
    ]
    return sorted(found, key=lambda request: request.arrival)


def predicted(records: list[Record], hop_seconds: float) -> dict[str, float]:
    """Return the simulator's figures. hop_seconds: that a first token takes on its way when nothing else runs."""
    names = (*MODELS, POOL)
    worker = DecodeWorker(names, max_batch=TIMES.most_rows)
    system = System("three nodes", (worker,) * DECODE_WORKERS, dict.fromkeys(names, 1), transfer_ms=1000 * hop_seconds)
    curves = Curves(lambda _variant, rows, _context: TIMES.of_step(rows), TIMES.of_prompt, "as they were set")
    result = simulate(trace(records), system, curves)
    return figures(result.seconds, result.tokens_per_s() * result.seconds, result.ttfts_ms(), result.tpots_ms())


def figures(seconds: float, tokens: float, ttfts: list[float], tpots: list[float]) -> dict[str, float]:
    return {
        "tokens_a_second": round(tokens / seconds, 2),
        "tpot_ms": round(statistics.fmean(tpots), 1),
        "ttft_ms": round(statistics.fmean(ttfts), 1),
    }


def observed(records: list[Record]) -> dict[str, float]:
    first, last = min(record.sent for record in records), max(record.last for record in records)
    tokens = sum(record.output_tokens for record in records)
    ttfts = [record.ttft_from_send_ms for record in records]
    return figures(last - first, tokens, ttfts, [record.tpot_ms for record in records])


async def hop_seconds(url: str) -> float:
    """Return by how much the first token of a lone request is later than the engines' own times."""
    found = []
    for one in planned("Poisson arrivals")[:9]:
        lone = dataclasses.replace(one, arrival=0.0, max_tokens=1)
        (record,) = await open_loop(Target(url), [lone], 1, quiet)
        own = TIMES.of_prompt(record.prompt_tokens - 1) + TIMES.of_step(1)
        found.append(record.first - record.sent - own)
    return max(0.0, statistics.median(found))


def run(root: Path) -> dict:
    fleet, found = PretendFleet(root), {}
    values = fleet.values()
    values["decode"]["workers"] = DECODE_WORKERS
    values["limits"] = dict.fromkeys(("deadline_seconds", "prefill_seconds", "stall_seconds"), 900.0)
    values["launch"]["environment"]["FAKE_TIMES"] = json.dumps(dataclasses.asdict(TIMES))
    with three_nodes(root) as nodes:
        nodes.deploy(values)
        until(lambda: warm(nodes.url, PAIRS), START_SECONDS, 0.5)
        found["hop_ms"] = round(1000 * (hop := asyncio.run(hop_seconds(nodes.url))), 1)
        for name in LOADS:
            records = asyncio.run(measured(nodes.url, name))
            ours, theirs = observed(records), predicted(records, hop)
            ratio = {figure: round(ours[figure] / theirs[figure], 3) for figure in ours}
            found[name] = {"measured": ours, "predicted": theirs, "ratio": ratio}
            found[name]["load_average"] = round(os.getloadavg()[0], 1)
            print(name, json.dumps(found[name]), flush=True)
    return found


def main() -> None:
    with temporary_root() as root:
        os.environ |= environment(root)
        found = run(root)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")
    ratios = [found[name]["ratio"][figure] for name in LOADS for figure in ("tokens_a_second", "tpot_ms")]
    if any(abs(ratio - 1) > MOST_OFF for ratio in ratios):
        raise SystemExit(f"off by more than {MOST_OFF:.0%}: {ratios}")


if __name__ == "__main__":
    main()
