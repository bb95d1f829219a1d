"""TTFT and TPOT of three deployments on real vLLMs: python tests/vllm/deployments.py BASE INT4 [REPORT.json]

BASE and INT4 are a full-precision base and its int4 decode module. One engine with four adapters, a prefill pool for
four adapters beside a decode worker, and two full modules with a prefill worker each beside a decode worker; one
deployment runs at a time. Needs Ray and the environment `vllm` of tests/oracles/run.sh. The machine must be quiet, as
these are seconds of the clock.
"""

import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tests.adapter_rig import write_adapter
from tests.vllm.asking import EXACT, client_of
from tests.vllm.cluster_files import write_cluster
from tests.vllm.running import running_cluster, vllm_python

NAMES = ("math", "code", "chat", "sql")
PROMPT, ANSWER, REQUESTS = 256, 48, 8
RANK = 16


def request(url, model, number):
    """Seconds until the first token, and seconds a token after it."""
    tokens = np.random.default_rng(number).integers(100, 10_000, PROMPT).tolist()
    arrived = []
    with client_of(url) as client:
        started = time.monotonic()
        stream = client.completions.create(
            model=model, prompt=tokens, max_tokens=ANSWER, temperature=0, stream=True, extra_body=EXACT
        )
        for event in stream:
            arrived += [time.monotonic()] * sum(len(choice.token_ids or []) for choice in event.choices)
    assert len(arrived) == ANSWER
    return arrived[0] - started, (arrived[-1] - arrived[0]) / (ANSWER - 1)


def load(url, models, at_once, first):
    """Medians of REQUESTS requests, so many at a time, to the models in turn."""
    with ThreadPoolExecutor(at_once) as pool:
        jobs = [pool.submit(request, url, models[i % len(models)], first + i) for i in range(REQUESTS)]
        found = [job.result() for job in jobs]
    ttft, tpot = (statistics.median(values) for values in zip(*found, strict=True))
    return {"ttft_ms": round(1000 * ttft), "tpot_ms": round(1000 * tpot, 1)}


def measure(root, values, pairs):
    models = list(values["models"])
    file = write_cluster(root, vllm_python(), decode={"module": str(root / "int4"), "workers": 1}, **values)
    with running_cluster(file, root, pairs) as cluster:
        load(cluster.url, models, REQUESTS, 10_000)  # warm
        return {f"{at_once} at once": load(cluster.url, models, at_once, 100 * at_once) for at_once in (1, REQUESTS)}


def main(base, int4, report=None):
    found = {}
    with tempfile.TemporaryDirectory(prefix="qsun-") as made:
        root = Path(made)
        for name, target in (("base", base), ("int4", int4)):
            (root / name).symlink_to(Path(target).resolve())
        for seed, name in enumerate(NAMES):
            write_adapter(root / "on-base" / name, root / "base", seed, RANK)
            write_adapter(root / "on-int4" / name, root / "base", seed, RANK, decode=root / "int4")
        launch = {
            "python": str(vllm_python()),
            "device": "cpu",
            "dtype": "bfloat16",
            "max_model_len": 512,
            "max_num_seqs": REQUESTS,
            "kv_cache_memory_bytes": 1 << 28,
        }
        full = {name: {"module": str(root / "base"), "workers": 1} for name in NAMES[:2]}
        pool = {"module": str(root / "base"), "workers": 1}
        for label, pairs, values in (
            ("one engine with adapters", 1, {"models": adapters(root / "on-int4")}),
            ("prefill pool of adapters", 1, {"models": adapters(root / "on-base"), "prefill": pool}),
            ("a full module for each model", 2, {"models": full}),
        ):
            found[label] = measure(root, values | {"launch": launch, "ray": {"cpus": 0.5}}, pairs)
            print(json.dumps({label: found[label]}), flush=True)
    if report:
        Path(report).write_text(json.dumps(found, indent=1) + "\n")


def adapters(folder):
    return {name: {"adapter": str(folder / name)} for name in NAMES}


if __name__ == "__main__":
    main(*sys.argv[1:])
