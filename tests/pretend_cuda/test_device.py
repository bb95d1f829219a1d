"""The pretended device itself: it refuses, counts and replays as a real one would."""

import copy

import pytest
import torch

from tests.pretend_cuda.tensors import PretendTensor


def test_tensors_say_where_they_are(pretend_cuda):
    for x in (torch.zeros(3, device="cuda"), torch.zeros(3).to("cuda"), torch.tensor([0.0] * 3, device="cuda:0")):
        assert isinstance(x, PretendTensor)
        assert (x.device, x.is_cuda, (x + 1).device) == (torch.device("cuda:0"), True, torch.device("cuda:0"))
    assert torch.zeros(3, device="cuda:1").to("cpu").device == torch.device("cpu")
    assert x.to("cuda") is x
    assert x.to("cuda:1", torch.float16).dtype == torch.float16
    assert torch.equal(copy.deepcopy(x).cpu(), torch.zeros(3))


def test_devices_do_not_mix(pretend_cuda):
    here, there = torch.ones(2, device="cuda:0"), torch.ones(2, device="cuda:1")
    for other in (there, torch.ones(2)):
        with pytest.raises(RuntimeError, match="same device"):
            here + other
    assert float(here.sum() + torch.tensor(1.0)) == 3  # a scalar of the host is fine


def test_kernels_and_waits_are_counted(pretend_cuda):
    x = torch.ones(4, 4, device="cuda")
    pretend_cuda.clear()
    (x.t() * 2)[:2].reshape(8, 1).t()
    assert pretend_cuda.kernels == {"aten::mul": 1, "aten::clone": 1}
    assert pretend_cuda.waits == []
    x[0, 0].item()
    assert [why for why, _ in pretend_cuda.waits] == ["item"]


def test_a_graph_follows_its_inputs(pretend_cuda):
    x, graph = torch.ones(2, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x * 2 + 1
    x.fill_(5)
    graph.replay()
    assert y.tolist() == [11, 11]
    assert sum(graph.kernels.values()) == 2


def test_a_capture_must_not_wait(pretend_cuda):
    x = torch.ones(2, device="cuda")
    with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.tolist()


def test_a_capture_on_the_stream_of_another_device_misses_kernels(pretend_cuda):
    x = torch.ones(2, device="cuda:1")
    for stream, missed in ((None, 1), (torch.cuda.Stream("cuda:1"), 0)):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            x * 2
        assert sum(graph.missed.values()) == missed


def test_a_model_moves(pretend_cuda):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    wanted = model(torch.ones(2, 4))
    moved = model.to("cuda:1")
    assert {p.device for p in moved.parameters()} == {torch.device("cuda:1")}
    assert torch.allclose(moved(torch.ones(2, 4, device="cuda:1")).cpu(), wanted, atol=1e-6)
