"""Modules, a cluster file and requests for Ray Serve with pretend vLLMs, and the processes that there are."""

import asyncio
import os
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import torch
from safetensors.torch import load_file, save_file

from qsun.demo import base_directory
from tests.adapter_rig import write_adapter
from tests.places import ROOT
from tests.serve.fake_vllm import expected_text

MODELS = ("math", "code")
ENGINE = Path(__file__).with_name("fake_engine")


def make_modules(root):
    """Two prefill modules of the demo base: all but a tensor."""
    for seed, model in enumerate(MODELS):
        directory = root / model
        shutil.copytree(base_directory(), directory)
        for file in directory.glob("*.safetensors"):
            tensors = load_file(file)
            first = min(tensors)
            noise = torch.randn(tensors[first].shape, generator=torch.Generator().manual_seed(seed))
            tensors[first] = (tensors[first].float() + 0.01 * noise).to(tensors[first].dtype)
            save_file(tensors, file, metadata={"format": "pt"})


def cluster_values(root, token_seconds=0.0, **changes):
    """cluster.yaml's values. `root` holds the modules, and gets logs and what prefill workers leave for decode ones."""
    (root / "network").mkdir(exist_ok=True)
    values = {
        "listen": {"port": 0},
        "decode": {"module": "demo", "workers": 2},
        "models": {model: {"module": str(root / model), "workers": 1} for model in MODELS},
        "health": {"interval_seconds": 1.0},
        "limits": {"no_worker_seconds": 30.0, "deadline_seconds": 120.0},
        "ray": {"cpus": 0.5, "linger_seconds": 1.0, "logs": str(root / "logs")},
        "launch": {
            "device": "cpu",
            "kernels": "vllm",
            "python": sys.executable,
            "start_seconds": 300.0,
            "environment": {
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ENGINE)]),
                "FAKE_NETWORK": str(root / "network"),
                "FAKE_SECONDS": str(token_seconds),
            },
        },
    }
    return values | changes


def make_adapters(root, names):
    """Adapters of the demo base in `root`. Return the models that they are."""
    for seed, name in enumerate(names):
        write_adapter(root / name, base_directory(), seed)
    return {name: {"adapter": str(root / name)} for name in names}


def expected(model, prompt, tokens):
    return expected_text(model, prompt, tokens)


async def one(client, number, tokens, models):
    """Send request `number`. Return "right", "wrong", or its error; streamed and whole answers take turns."""
    model, prompt, stream = models[number % len(models)], f"{number} of some words", number % 4 < 2
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "stream": stream}
    try:
        answer = await client.post("/v1/completions", json=body)
    except httpx.HTTPError as error:
        return f"{type(error).__name__}"
    if answer.status_code != 200:
        return f"status {answer.status_code}"
    text, complete = streamed(answer.text) if stream else (answer.json()["choices"][0]["text"], True)
    wanted = expected(model, prompt, tokens)
    if not complete and wanted.startswith(text):
        return "cut off"
    if text != wanted:
        print(f"WRONG: {model} {prompt!r}: {text[:60]!r} and not {wanted[:60]!r}", file=sys.stderr, flush=True)
        return "wrong"
    return "right"


def streamed(body):
    """The text of a stream, and whether it is complete: one that broke ends with an error and without [DONE]."""
    import json

    events = [line[6:] for line in body.splitlines() if line.startswith("data: ")]
    parsed = [json.loads(event) for event in events if event != "[DONE]"]
    return "".join(c["text"] for event in parsed for c in event.get("choices", [])), events[-1:] == ["[DONE]"]


async def many(url, numbers, tokens=20, at_once=32, models=MODELS):
    """Send requests, so many at a time. Return how many ended in which way."""
    turns = asyncio.Semaphore(at_once)

    async def in_turn(client, number):
        async with turns:
            return await one(client, number, tokens, models)

    limits = httpx.Limits(max_connections=at_once)
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=180.0, limits=limits) as client:
        return Counter(await asyncio.gather(*(in_turn(client, number) for number in numbers)))


def ready(url):
    """What /ready says; None where nothing answers."""
    try:
        return httpx.get(f"{url}/ready", trust_env=False, timeout=5.0).json()
    except (httpx.HTTPError, ValueError):
        return None


def until(condition, seconds=120.0):
    """Return after how many seconds something holds."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"not within {seconds} s"
        time.sleep(0.05)
    return time.monotonic() - started


def warm(url, pairs):
    state = ready(url)
    return state is not None and state["ready"] and state["warm_pairs"] == pairs


def processes(*words):
    """Pids of the processes whose command lines have all of these words."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if all(word in line for word in words):
                found.append(int(entry.name))
    return found


def engines(root, role=""):
    """Pids of the pretend vLLMs of a cluster whose modules and logs are in `root`, by role."""
    kinds = {"decode": "kv_consumer", "prefill": "kv_producer", "": ""}
    return [pid for pid in processes("vllm.entrypoints", kinds[role]) if str(root) in environment(pid)]


def environment(pid):
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def kill(pid):
    os.kill(pid, signal.SIGKILL)
