"""Mixed load on `qsun serve` for as long as asked: python tests/serve/soak.py MINUTES [REPORT.json]

Clients that wait, stream, disconnect early, read slowly or send garbage, and modules that come and go. At
the end memory must be flat, no request lost or stuck, and every counter must add up. Exit code 1 where not.
"""

import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx

CLIENTS = 12
PROMPT = "Ann has 12 eggs and gets 8 more. How many eggs?>"
RUBBISH = [
    b"{",
    b"[]",
    b'{"model": 1}',
    b'{"model": "a", "prompt": []}',
    b"\xff" * 100,
    b'{"model": "none", "prompt": "x"}',
    b'{"model": "a", "prompt": "x", "temperature": -1}',
    b"x" * (2 << 20),
]


class Soak:
    def __init__(self, url, pid, seconds):
        self.url, self.pid, self.until = url, pid, time.monotonic() + seconds
        self.seen = Counter()
        self.memory = []
        self.waits = []

    def body(self, rng, **more):
        return {"model": rng.choice(["a", "b", "c"]), "prompt": PROMPT * rng.randrange(1, 5), "temperature": 1.0,
                "max_tokens": rng.randrange(1, 120), "ignore_eos": True, **more}  # fmt: skip

    async def client(self, number):
        rng = random.Random(number)
        kinds = [self.whole, self.whole, self.stream, self.stream, self.leaves, self.slow, self.rubbish]
        while time.monotonic() < self.until:
            async with httpx.AsyncClient(base_url=self.url, timeout=120) as http:
                for _ in range(20):
                    if time.monotonic() >= self.until:
                        break
                    started = time.monotonic()
                    await rng.choice(kinds)(http, rng)
                    self.waits.append(time.monotonic() - started)

    async def whole(self, http, rng):
        body = self.body(rng, n=rng.choice([1, 1, 3]))
        answer = await http.post("/v1/completions", json=body)
        self.seen[f"whole {answer.status_code}"] += 1
        if answer.status_code == 200:
            self.seen["answers"] += body["n"]
            self.seen["tokens"] += answer.json()["usage"]["completion_tokens"]
            assert answer.json()["usage"]["completion_tokens"] == body["n"] * body["max_tokens"]

    async def stream(self, http, rng, pause=0.0):
        body = self.body(rng, stream=True, stream_options={"include_usage": True})
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            self.seen[f"stream {answer.status_code}"] += 1
            lines = []
            async for line in answer.aiter_lines():
                if line:
                    lines.append(line)
                await asyncio.sleep(pause)
        if answer.status_code == 200:
            assert lines[-1] == "data: [DONE]", lines[-1]
            self.seen["answers"] += 1
            self.seen["tokens"] += json.loads(lines[-2][6:])["usage"]["completion_tokens"]

    async def slow(self, http, rng):
        await self.stream(http, rng, pause=0.02)

    async def leaves(self, http, rng):
        async with http.stream("POST", "/v1/completions", json=self.body(rng, stream=True, max_tokens=300)) as answer:
            self.seen[f"left {answer.status_code}"] += 1
            left = rng.randrange(1, 30)
            async for _ in answer.aiter_lines():
                left -= 1
                if not left:
                    break

    async def rubbish(self, http, rng):
        try:
            headers = {"Content-Type": "application/json"}
            answer = await http.post("/v1/completions", content=rng.choice(RUBBISH), headers=headers)
        except httpx.TransportError:  # refused before it was all sent
            self.seen["rubbish cut off"] += 1
            return
        assert 400 <= answer.status_code < 500, answer.text
        self.seen[f"rubbish {answer.status_code}"] += 1

    async def comings_and_goings(self):
        async with httpx.AsyncClient(base_url=self.url, timeout=120) as http:
            while time.monotonic() < self.until:
                added = await http.post("/admin/models", json={"name": "d", "directory": "demo"})
                assert added.status_code == 201, added.text
                answer = await http.post("/v1/completions", json={"model": "d", "prompt": PROMPT, "max_tokens": 2,
                                                                  "ignore_eos": True})  # fmt: skip
                assert answer.status_code == 200, answer.text
                self.seen.update({"answers": 1, "tokens": 2})
                gone = await http.delete("/admin/models/d")
                assert gone.json()["deleted"], gone.text
                self.seen["modules that came and went"] += 1
                await asyncio.sleep(5)

    async def watch(self):
        while time.monotonic() < self.until:
            pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
            self.memory.append(pages * 4096 / 2**20)
            await asyncio.sleep(5)

    async def run(self):
        await asyncio.gather(self.watch(), self.comings_and_goings(), *(self.client(i) for i in range(CLIENTS)))
        async with httpx.AsyncClient(base_url=self.url, timeout=120) as http:
            deadline = time.monotonic() + 30
            while (running := await self.metric(http, "qsun_requests_decoding")) and time.monotonic() < deadline:
                await asyncio.sleep(0.2)
            finished = await self.outcomes(http)
            return {
                "stuck": running + await self.metric(http, "qsun_requests_waiting"),
                "outcomes": finished,
                "ttft_count": await self.metric(http, "qsun_ttft_seconds_count"),
            }

    async def metric(self, http, name):
        lines = (await http.get("/metrics")).text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    async def outcomes(self, http):
        found = Counter()
        for line in (await http.get("/metrics")).text.splitlines():
            if line.startswith("qsun_requests_total"):
                found[line.partition('outcome="')[2].partition('"')[0]] += int(float(line.rpartition(" ")[2]))
        return dict(found)


def problems(soak, end):
    quarter = len(soak.memory) // 4
    early, late = max(soak.memory[quarter : 2 * quarter]), max(soak.memory[3 * quarter :])
    done = end["outcomes"].get("length", 0)
    found = {
        f"memory grew from {early:.0f} to {late:.0f} MiB": late > 1.05 * early,
        f"{end['stuck']:.0f} requests are stuck": bool(end["stuck"]),
        f"{done} requests finished, and clients had {soak.seen['answers']} answers": not (
            soak.seen["answers"] <= done <= soak.seen["answers"] + soak.seen["left 200"]
        ),
        f"outcomes that must not be: {end['outcomes']}": set(end["outcomes"]) - {"length", "cancelled"} != set(),
        "a client waited more than 60 s": max(soak.waits) > 60,
    }
    return [text for text, wrong in found.items() if wrong], early, late


def main(minutes, report=None):
    command = [sys.executable, "-m", "qsun.cli.main", "serve", "--decode", "demo", "--port", "0", "--json", "--admin",
               "--threads", "1", "--max-batch", "8", "--prefix-cache", "4MiB"]  # fmt: skip
    for name in "abc":
        command += ["--prefill", f"{name}=demo"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = json.loads(server.stdout.readline())["url"]
        soak = Soak(url, server.pid, 60 * minutes)
        end = asyncio.run(soak.run())
        server.terminate()
        code = server.wait(60)
    finally:
        server.kill()
        server.stdout.close()
    found, early, late = problems(soak, end)
    found += [f"exit code {code}"] if code else []
    result = {"minutes": minutes, "problems": found, "seen": dict(soak.seen), **end, "requests": len(soak.waits),
              "longest_wait_s": round(max(soak.waits), 2), "memory_mib_second_quarter": round(early),
              "memory_mib_last_quarter": round(late)}  # fmt: skip
    print(json.dumps(result, indent=1))
    if report:
        Path(report).write_text(json.dumps(result, indent=1) + "\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), *sys.argv[2:3]))
