"""Real vLLM on this CPU through `qsun up`: two prefill workers, two int4 decode workers on our kernels, NIXL.

Workers are replicas of Ray Serve, and the client is OpenAI's. The reference for every request is `qsun.generate` with
the same modules in float32, so a token that came from the wrong cache, module or seam shows. Tests run in order: the
later ones kill a worker and end it all.
"""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from tests.oracles.compare import record
from tests.serve.ray.rig import engines
from tests.vllm.asking import (
    DEADLINE_SECONDS,
    EXACT,
    LENGTHS,
    NEW_TOKENS,
    Request,
    ask,
    ask_all,
    prompt,
    reference,
)
from tests.vllm.cluster_files import MODELS, make_modules, write_cluster
from tests.vllm.listening import is_loopback, listening_addresses, members
from tests.vllm.running import running_cluster, vllm_python, wait_for

pytestmark = pytest.mark.oracle

PAIRS = 4


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    return make_modules(tmp_path_factory.mktemp("cluster"))


@pytest.fixture(scope="module")
def expected(modules):
    """expected(requests): tokens of `qsun.generate`."""
    return reference(modules)


@pytest.fixture(scope="module")
def cluster(modules):
    root = modules["base"].parent
    with running_cluster(write_cluster(root, vllm_python(), ray={"cpus": 0.5}), root, PAIRS) as found:
        yield found


def test_a_decode_worker_refuses_a_request_that_bypasses_the_router(cluster):
    url = cluster.engine_url("decode")
    assert ("127.0.0.1", httpx.URL(url).port) in listening_addresses([cluster.engine("decode")])
    served = httpx.get(f"{url}/v1/models", trust_env=False).json()["data"][0]["id"]
    body = {"model": served, "prompt": [1, 5, 6], "max_tokens": 1}
    answer = httpx.post(f"{url}/v1/completions", json=body, trust_env=False)
    assert answer.status_code == 400
    assert "only with the KV cache of a prefill worker" in answer.json()["error"]["message"]


def test_the_client_sees_every_model(cluster):
    with cluster.client() as client:
        assert sorted(model.id for model in client.models.list()) == sorted(MODELS)


def test_workers_listen_on_the_loopback_address_only(cluster):
    """Each pair is warm, so that NIXL's transport is up as well as the API and the side channel."""
    assert len(engines(cluster.root)) == PAIRS
    for pid in engines(cluster.root):
        found = listening_addresses(members(os.getpgid(pid)))
        assert {address for address, _ in found if not is_loopback(address)} == set()


def test_64_concurrent_requests_over_both_models(cluster, expected):
    requests = [
        Request(model, prompt(length, seed), stream)
        for seed, length in enumerate(LENGTHS * 2)
        for model in MODELS
        for stream in (False, True)
    ]
    assert len(requests) == 64
    started = time.monotonic()
    answers = ask_all(cluster.url, requests)
    record("vllm cluster", requests=len(requests), seconds=round(time.monotonic() - started))
    wrong = [request for request, a, b in zip(requests, answers, expected(requests), strict=True) if a != b]
    assert wrong == []


def test_the_same_prompt_to_both_models_never_leaks(cluster, expected):
    """Longer than two blocks, sent repeatedly: the second model would hit a cache that ignores the model."""
    requests = [Request(model, prompt(300, seed=77), stream=False) for model in (*MODELS, *MODELS[::-1]) * 2]
    wanted = expected(requests)
    assert wanted[0] != wanted[1]
    assert [ask(cluster.url, request) for request in requests] == wanted


def test_a_chat_is_rendered_and_answered(cluster, expected):
    chat = [{"role": "user", "content": "Ann has 12 eggs and gets 8 more. How many eggs?"}]
    for model in MODELS:
        with cluster.client() as client:
            answer = client.chat.completions.create(
                model=model, messages=chat, max_completion_tokens=NEW_TOKENS, temperature=0, extra_body=EXACT
            )
        request = Request(model, tuple(answer.prompt_token_ids), stream=False)
        assert answer.choices[0].token_ids == expected([request])[0]
        assert answer.usage.completion_tokens == NEW_TOKENS


def test_an_unknown_model_is_404(cluster):
    with pytest.raises(openai.NotFoundError):
        ask(cluster.url, Request("nobody", prompt(5, 0), stream=False))


def test_a_decode_worker_killed_under_load_comes_back(cluster, expected):
    """Every request ends with the right tokens or a clear error, none with wrong ones; Serve starts another replica."""
    requests = [
        Request(MODELS[seed % 2], prompt(LENGTHS[seed % 8], 100 + seed), seed % 4 < 2, 96) for seed in range(32)
    ]
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask_all, cluster.url, requests)
        time.sleep(5.0)
        os.kill(cluster.engine("decode"), signal.SIGKILL)
        killed = time.monotonic()
        wait_for(lambda: cluster.warm_pairs() < PAIRS)
        wait_for(lambda: cluster.warm_pairs() == PAIRS)
        back = time.monotonic() - killed
        answers = asked.result(DEADLINE_SECONDS)
    failed = [answer for answer in answers if isinstance(answer, openai.APIError)]
    record("vllm cluster", killed_under=len(requests), failed=len(failed), seconds_until_back=round(back))
    for answer, wanted in zip(answers, expected(requests), strict=True):
        so_far = getattr(answer, "tokens", []) if isinstance(answer, openai.APIError) else answer
        assert so_far == wanted[: len(so_far)]
        assert isinstance(answer, openai.APIError) or answer == wanted
    assert len(failed) < len(requests)
    after = [Request(model, prompt(129, 500), stream) for model in MODELS for stream in (False, True)]
    assert ask_all(cluster.url, after) == expected(after)


def test_ctrl_c_takes_all_down(cluster):
    cluster.process.send_signal(signal.SIGINT)
    assert cluster.process.wait(timeout=120) == 0
    assert engines(cluster.root) == []
