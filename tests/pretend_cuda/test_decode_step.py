"""Decode steps on a second GPU while the first is the current one: every kernel is captured, and answers are right."""

import pytest
import torch

import qsun
from qsun.engine.config import EngineConfig, Sampling
from qsun.engine.engine import Engine
from qsun.engine.requests import Request
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
