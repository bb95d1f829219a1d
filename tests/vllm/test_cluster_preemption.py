"""Real vLLM through `qsun up` where KV blocks run out on the decode worker.

vLLM would compute a preempted request's prompt again with the decode module's weights (qsun/vllm/preemption.py). The
reference for every answer is `qsun.generate`.
"""

import openai
import pytest

from tests.oracles.compare import record
from tests.vllm.asking import Request, ask, ask_all, prompt, reference
from tests.vllm.cluster_files import MODELS, cluster_values, make_modules, write_cluster
from tests.vllm.running import running_cluster, vllm_python

pytestmark = pytest.mark.oracle

BLOCKS = 6  # of 128 tokens, one of which vLLM keeps: there is room for one long answer
NEW_TOKENS = 300  # after 100: four blocks


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    return make_modules(tmp_path_factory.mktemp("cluster"))


@pytest.fixture(scope="module")
def cluster(modules):
    root, python = modules["base"].parent, vllm_python()
    few_blocks = {"decode_arguments": ["--num-gpu-blocks-override", str(BLOCKS)]}
    changes = {
        "decode": {"module": "decode", "workers": 1},
        "models": {MODELS[0]: {"module": MODELS[0], "workers": 1}},
        "launch": cluster_values(python)["launch"] | few_blocks,
        "ray": {"cpus": 0.5},
    }
    with running_cluster(write_cluster(root, python, **changes), root, pairs=1) as found:
        yield found


def test_a_preempted_request_has_the_right_tokens_or_an_error(cluster, modules):
    requests = [Request(MODELS[0], prompt(100, seed), seed % 2 == 0, NEW_TOKENS) for seed in range(4)]
    answers, expected = ask_all(cluster.url, requests), reference(modules)
    failed = [answer for answer in answers if isinstance(answer, openai.APIError)]
    preempted = sum(log.read_text().count("was preempted") for log in (cluster.root / "logs").glob("decode*"))
    record("vllm preemption", requests=len(requests), preempted=preempted, failed=len(failed))
    for answer, wanted in zip(answers, expected(requests), strict=True):
        so_far = getattr(answer, "tokens", []) if isinstance(answer, openai.APIError) else answer
        assert so_far == wanted[: len(so_far)]
        assert isinstance(answer, openai.APIError) or answer == wanted
    assert preempted > 0
    assert len(failed) < len(requests)
    after = Request(MODELS[0], prompt(100, 9), stream=False, max_tokens=NEW_TOKENS)
    assert ask(cluster.url, after) == expected([after])[0]
