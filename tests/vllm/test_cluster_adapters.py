"""Real vLLM through `qsun up`: one prefill worker with adapters, an int4 decode worker without, NIXL, and the router.

The reference is `qsun.generate` with the adapters merged, in float32.
"""

from pathlib import Path

import httpx
import pytest

import qsun
from qsun.model.lora import adapter_fingerprint
from tests.adapter_rig import merged, write_adapter
from tests.oracles.compare import record
from tests.vllm.asking import LENGTHS, Request, answers_of, ask, ask_all, prompt
from tests.vllm.cluster_files import make_modules, write_cluster
from tests.vllm.running import running_cluster, vllm_python

pytestmark = pytest.mark.oracle

RANKS = {"math": 4, "code": 8, "chat": 3}


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    root = tmp_path_factory.mktemp("cluster")
    made = make_modules(root)
    for seed, (name, rank) in enumerate(RANKS.items()):
        made[name] = write_adapter(root / "adapters" / name, made["base"], seed, rank)
    return made


@pytest.fixture(scope="module")
def expected(modules):
    """expected(requests): tokens of `qsun.generate` with merged adapters."""
    decode = qsun.load_decode(modules["decode"], device="cpu", dtype="float32")
    base = qsun.load_decode(modules["base"], device="cpu", dtype="float32").model
    return answers_of(decode, {name: merged(base, modules[name]) for name in RANKS})


@pytest.fixture(scope="module")
def cluster(modules):
    root: Path = modules["base"].parent
    models = {name: {"adapter": f"adapters/{name}"} for name in RANKS}
    changes = {
        "decode": {"module": "decode", "workers": 1},
        "prefill": {"module": "base", "workers": 1},
        "models": models,
        "ray": {"cpus": 0.5},
    }
    with running_cluster(write_cluster(root, vllm_python(), **changes), root, pairs=1) as found:
        yield found


def served(cluster, role):
    """(URL, names served) of the one worker of a role."""
    url = cluster.engine_url(role)
    return url, [model["id"] for model in httpx.get(f"{url}/v1/models", trust_env=False).json()["data"]]


def test_only_the_prefill_worker_has_adapters(cluster, modules):
    names = {f"qsun-{adapter_fingerprint(modules[name])[:16]}" for name in RANKS}
    assert names <= set(served(cluster, "prefill")[1])
    assert len(served(cluster, "decode")[1]) == 1


def test_the_decode_worker_refuses_a_request_that_brings_no_kv(cluster):
    url, (name,) = served(cluster, "decode")
    answer = httpx.post(
        f"{url}/v1/completions", json={"model": name, "prompt": [1, 5, 6], "max_tokens": 1}, trust_env=False
    )
    assert answer.status_code == 400
    assert "only with the KV cache of a prefill worker" in answer.json()["error"]["message"]


def test_48_concurrent_requests_over_three_adapters(cluster, expected):
    requests = [
        Request(model, prompt(length, seed), stream)
        for seed, length in enumerate(LENGTHS)
        for model in RANKS
        for stream in (False, True)
    ]
    answers, wanted = ask_all(cluster.url, requests), expected(requests)
    wrong = [request for request, a, b in zip(requests, answers, wanted, strict=True) if a != b]
    record("vllm cluster with adapters", requests=len(requests), wrong=len(wrong))
    assert wrong == []
    assert len({tuple(answer) for answer in wanted[-6:]}) == 3  # the longest prompt, to each adapter


def test_a_prompt_goes_to_every_adapter_in_turn_and_grows(cluster, expected):
    """Two blocks of one prompt, cached by each adapter, and the same as the beginning of a longer one."""
    tokens = prompt(256, seed=77)
    requests = [
        Request(model, piece, stream=False)
        for piece in (tokens, (*tokens, *prompt(40, seed=78)))
        for model in (*RANKS, *RANKS)
    ]
    assert [ask(cluster.url, request) for request in requests] == expected(requests)
