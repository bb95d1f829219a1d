"""Which stored layers stand behind a fused layer of vLLM, read from a module's own tensors."""

import pytest
from safetensors.torch import save_file

from qsun.config import LayerSpec
from qsun.errors import QsunError
from qsun.model.checkpoint import Checkpoint
from qsun.vllm.stored import StoredLayers
from tests.vllm.test_shards import K, stored_layer

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
SPEC = LayerSpec(4, 64, True)


@pytest.fixture
def module(tmp_path):
    """module(q_proj=spec, ...): StoredLayers of a directory with these GPTQ layers in block 0."""

    def make(**specs):
        tensors = {}
        for name, spec in specs.items():
            for suffix, tensor in stored_layer(64, "gptq", spec)[1].items():
                tensors[f"model.layers.0.self_attn.{name}.{suffix}"] = tensor
        save_file(tensors, tmp_path / "model.safetensors")
        return StoredLayers.of(Checkpoint(tmp_path), "gptq")

    return make


def test_parts_of_a_fused_layer(module):
    stored = module(q_proj=SPEC, k_proj=SPEC, v_proj=SPEC)
    parts = stored.parts("model.layers.0.self_attn.qkv_proj", FUSED)
    assert [part.rpartition(".")[2] for part in parts] == ["q_proj", "k_proj", "v_proj"]
    assert stored.spec(parts, K) == LayerSpec(4, 64, False)  # GPTQ always stores zero points
    assert stored.suffixes(parts) == ["qweight", "qzeros", "scales", "g_idx"]
    assert stored.dense_bytes() >= 3 * 64 * K * 4


def test_a_layer_in_full_precision(module):
    assert module(q_proj=SPEC).parts("model.layers.1.self_attn.qkv_proj", FUSED) == []
    assert module(q_proj=SPEC).parts("lm_head", FUSED) == []


def test_parts_that_are_not_all_quantized_are_refused(module):
    with pytest.raises(QsunError, match=r"k_proj is not quantized and the rest of .*qkv_proj is"):
        module(q_proj=SPEC, v_proj=SPEC).parts("model.layers.0.self_attn.qkv_proj", FUSED)


def test_parts_of_different_settings_are_refused(module):
    stored = module(q_proj=SPEC, k_proj=LayerSpec(8, 64, True), v_proj=SPEC)
    parts = stored.parts("model.layers.0.self_attn.qkv_proj", FUSED)
    with pytest.raises(QsunError, match=r"q_proj is LayerSpec.*and .*k_proj is LayerSpec.bits=8"):
        stored.spec(parts, K)
