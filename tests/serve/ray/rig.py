"""Modules, a cluster file and requests for Ray Serve with pretend vLLMs, and the processes that there are."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch
import yaml
from safetensors.torch import load_file, save_file

from qsun.demo import base_directory
from tests.adapter_rig import write_adapter
from tests.places import ROOT
from tests.serve.fake_vllm import expected_text
from tests.serve.ray.live import load
from tests.serve.ray.live.load import Question

MODELS = ("math", "code")
ENGINE = Path(__file__).with_name("fake_engine")
SETTINGS = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
DEADLINE_SECONDS = 300


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


def question(number, tokens):
    """Request `number` to pretend vLLMs: models take turns, and so do streams and whole answers."""
    model, prompt, stream = MODELS[number % len(MODELS)], f"{number} of some words", number % 4 < 2
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "stream": stream}
    return Question(body, (expected_text(model, prompt, tokens),))


async def many(url, numbers, tokens=20, at_once=32):
    """Send requests, so many at a time. Return how many ended in which way."""
    return await load.many(url, (question(number, tokens) for number in numbers), at_once)


@contextmanager
def started(root, values):
    """Run `qsun up` in the block; `said` is what it prints on stderr."""
    file = root / "cluster.yaml"
    file.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "qsun.cli.main", "up", str(file), "--json"]
    settings = os.environ | SETTINGS | {"TEST_ROOT": str(root)}
    with (root / "said").open("w") as errors:
        process = subprocess.Popen(command, cwd=root, env=settings, stdout=subprocess.PIPE, stderr=errors, text=True)
    process.said = (root / "said").read_text
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(timeout=DEADLINE_SECONDS)
        process.stdout.close()


def ready(url):
    """What /ready says; None where nothing answers."""
    try:
        return httpx.get(f"{url}/ready", trust_env=False, timeout=5.0).json()
    except (httpx.HTTPError, ValueError):
        return None


def until(condition, seconds=120.0, every=0.05):
    """Return after how many seconds something holds. every: how often to look."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"not within {seconds} s"
        time.sleep(every)
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
