"""Decode modules of 2, 3 and 8 bits on a pretended CUDA device: packed kernels run, on as few bytes as they should."""

import pytest
import torch

import qsun
from qsun.config import LayerSpec
from qsun.engine.config import EngineConfig, Sampling
from qsun.engine.engine import Engine
from qsun.engine.requests import Request
from qsun.kernels.layout import TILES
from qsun.model.formats import pack_layer
from qsun.runtime.fused_block import FusedBlock
from qsun.vllm.shards import LayerShard, shard_tensors, unpack_shard
from tests.engine_rig import run_until_idle, tokens_of
from tests.kernels.test_int4_cpu import random_weights

PROMPTS = ((5, 6, 7), tuple(range(3, 40)), (9,))
# Heads and columns that the fused block and whole tiles support.
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


@pytest.fixture(scope="module")
def modules(tiny_model, tmp_path_factory):
    """Directories of a base and of its decode modules of 2, 3 and 8 bits."""
    base = tiny_model("llama", torch.float32, **SIZES)
    made = {bits: tmp_path_factory.mktemp("low") / f"{bits}bit" for bits in (2, 3, 8)}
    for bits, directory in made.items():
        config = qsun.QuantConfig(method="rtn", bits=bits, group_size=64, sym=bits != 3, format="compressed-tensors")
        qsun.quantize(base, directory, config)
    return base, made


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_a_module_computes_as_on_a_cpu(modules, bits, pretend_cuda):
    directory = modules[1][bits]
    ids = torch.arange(5, 45).view(2, 20)
    wanted = qsun.load_decode(directory, "cpu", "float32").model(ids).logits
    model = qsun.load_decode(directory, "cuda", "bfloat16").model
    layers = [layer for layer in model.modules() if isinstance(layer, qsun.QuantLinear)]
    assert {(layer.storage, layer.bits) for layer in layers} == {("triton", bits)}
    words = sum(layer.words.numel() * 2 for layer in layers)
    assert words * 8 == bits * sum(layer.in_features * layer.out_features for layer in layers)
    pretend_cuda.clear()
    logits = model(ids.to("cuda")).logits.cpu().float()
    assert (logits - wanted).norm() < 0.08 * wanted.norm()  # bfloat16 and a random model: 2 to 4%
    assert {launch["BITS"] for launch in pretend_cuda.launches if launch["kernel"] == "packed_matmul"} == {bits}
    assert not any("bytes_linear" in name or "dequantize" in name for name in pretend_cuda.kernels)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_the_engine_decodes_in_fused_steps(modules, bits, pretend_cuda):
    base, made = modules
    decode = qsun.load_decode(made[bits], "cuda", "bfloat16")
    assert all(isinstance(block, FusedBlock) for block in decode.model.model.layers)
    prefill = qsun.load_prefill(base, decode)
    engine = Engine(decode, EngineConfig(kv_bytes=1 << 21))
    engine.add_module("m", prefill)
    for number, prompt in enumerate(PROMPTS):
        engine.submit(Request(str(number), "m", prompt, Sampling(max_new_tokens=4, ignore_eos=True)))
    found = run_until_idle(engine)
    blocks = len(decode.model.model.layers)
    for graph in pretend_cuda.graphs:
        assert graph.kernels["triton::packed_matmul"] == 4 * blocks
        assert not graph.missed
    plain = qsun.load_decode(made[bits], "cuda", "bfloat16", fuse=False)
    alone = qsun.generate(prefill, plain, [list(p) for p in PROMPTS], max_new_tokens=4, eos=(), static=False)
    assert [tokens_of(found[str(number)]) for number in range(3)] == alone


@pytest.mark.parametrize("bits", TILES)
def test_what_vllm_loads_runs_on_the_same_kernels(bits, pretend_cuda):
    """The plugin makes a QuantLinear of the tensors that vLLM loaded; this is that step without vLLM."""
    weights = random_weights(64, 256, 64, top=2**bits - 1)
    weights = weights._replace(zeros=torch.full_like(weights.zeros, 2 ** (bits - 1)))
    spec = LayerSpec(bits=bits, group_size=64, sym=True)
    shard = LayerShard("layer", "compressed-tensors", spec, 256, 256, (64,))
    stored = pack_layer(weights, spec, "compressed-tensors")
    loaded = {suffix: stored[suffix].to("cuda") for suffix in shard_tensors(shard, list(stored))}
    layer = qsun.QuantLinear(unpack_shard(loaded, shard), None, bits, torch.bfloat16)
    assert (layer.storage, layer.bits) == ("triton", bits)
    x = torch.randn(3, 256, device="cuda", dtype=torch.bfloat16)
    pretend_cuda.clear()
    y = layer(x)
    assert pretend_cuda.kernels == {"triton::packed_matmul": 1}
    wanted = x.cpu().float() @ weights.dequantize().t()
    assert (y.cpu().float() - wanted).norm() < 0.01 * wanted.norm()
