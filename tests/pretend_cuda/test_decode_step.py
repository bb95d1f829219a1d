"""Decode steps on a second GPU while the first is the current one: every kernel is captured, and answers are right."""

import pytest
import torch

import qsun
from qsun.engine.config import EngineConfig, Sampling
from qsun.engine.engine import Engine
from qsun.engine.requests import Request
from qsun.engine.token_choice import most_likely
from qsun.eval.speed.decode_speed import filled_batch, take_step
from tests.engine_rig import run_until_idle, tokens_of

PROMPTS = ((5, 6, 7), tuple(range(3, 40)), (9,))


def engine_on(directory, device):
    decode = qsun.load_decode(directory, device, torch.float32)
    engine = Engine(decode, EngineConfig(kv_bytes=1 << 20))
    engine.add_module("m", qsun.load_prefill(directory, decode))
    for number, prompt in enumerate(PROMPTS):
        engine.submit(Request(str(number), "m", prompt, Sampling(max_new_tokens=4 + number, ignore_eos=True)))
    return engine


@pytest.fixture
def expected(tiny_model):
    decode = qsun.load_decode(tiny_model("llama"), "cpu", torch.float32)
    prefill = qsun.load_prefill(tiny_model("llama"), decode)
    return [
        qsun.generate(prefill, decode, [list(prompt)], max_new_tokens=4 + number, eos=())[0]
        for number, prompt in enumerate(PROMPTS)
    ]


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_graphs_hold_every_kernel_of_the_step(expected, tiny_model, device, pretend_cuda):
    found = run_until_idle(engine_on(tiny_model("llama"), device))
    assert torch.cuda.current_device() == 0
    assert [tokens_of(found[str(number)]) for number in range(3)] == expected
    assert len(pretend_cuda.graphs) >= 2  # of 4 rows and of fewer
    for graph in pretend_cuda.graphs:
        assert sum(graph.kernels.values()) > 50
        assert not graph.missed
        assert graph.device == torch.device(device)


def test_captures_share_a_pool_and_fail_for_their_own_thread_only(expected, tiny_model, pretend_cuda, monkeypatch):
    asked, graph = [], torch.cuda.graph

    def watched(captured, **options):
        asked.append(options)
        return graph(captured, **options)

    monkeypatch.setattr(torch.cuda, "graph", watched)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    run_until_idle(engine_on(tiny_model("llama"), "cuda:1"))
    assert {options["capture_error_mode"] for options in asked} == {"thread_local"}
    assert len({options["pool"] for options in asked}) == 1 < len(asked)


def test_the_host_waits_to_send_tokens_and_to_read_them(tiny_model, pretend_cuda):
    """And for nothing else in a step of greedy rows."""
    model = qsun.load_decode(tiny_model("llama"), "cuda", torch.float32).model
    batch = filled_batch(model, 3, 20, 8)
    for _ in range(2):
        take_step(batch)
        pretend_cuda.waits.clear()
    take_step(batch)
    assert [why for why, _ in pretend_cuda.waits] == ["copy between host and device", "tolist"], pretend_cuda.waits


@pytest.mark.parametrize("vocabulary", [7, 64, 6400])
def test_the_most_likely_token_is_found_in_two_stages(vocabulary, pretend_cuda):
    logits = torch.randn(9, vocabulary)
    logits[1] = 0.0  # all equal: the first
    logits[2, vocabulary // 2 :] = 9.0
    logits[3, vocabulary - 1] = float("nan")
    logits[4, 0] = float("inf")
    logits[5, 1] = float("-inf")
    wanted = logits.argmax(-1)
    wanted[3:5] = -1
    assert most_likely(logits.to("cuda")).tolist() == wanted.tolist() == most_likely(logits).tolist()
