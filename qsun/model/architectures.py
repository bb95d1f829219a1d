"""Which blocks and linear layers a model family has: a table, not subclasses.

A stage is a set of linear layers that read the same input. Stages run in forward order; a pass quantizes one stage
after another, so that later ones see the errors of earlier ones. vLLM fuses the layers of a stage into one, so their
grids must agree.
"""

from dataclasses import dataclass, replace
from typing import Any

from qsun.errors import QsunError

BLOCKS = "model.layers."
ATTENTION_END, MLP_END = 1, 3  # numbers of the stages that end the halves of a block


@dataclass(frozen=True)
class Stage:
    """Linear layers of a block that share an input.

    Attributes:
        layers: names inside the block.
        producer: what makes the input, where an inverse channel scale can be folded: a norm, or a linear layer's rows.
        rows: which part of the producing linear layer's output rows is meant: (part, parts).
        ends_half: its output is what attention, or the MLP, gives to the residual stream.
    """

    layers: tuple[str, ...]
    producer: str | None = None
    rows: tuple[int, int] = (0, 1)
    ends_half: bool = False


@dataclass(frozen=True)
class Architecture:
    """A model family, block by block. All of them keep their blocks in model.layers.

    Attributes:
        stages: in forward order; those numbered ATTENTION_END and MLP_END end the two halves of a block.
        attention, mlp: the two halves.
        norm_offset: RMSNorm multiplies by (offset + weight): 1 in Gemma.
        output_added: the halves' outputs are added to the residual as they are (no norm between).
        masks_by_type: the model's forward takes one attention mask for each of config.layer_types, not one for all.
    """

    stages: tuple[Stage, Stage, Stage, Stage]
    norm_offset: float = 0.0
    output_added: bool = True
    masks_by_type: bool = False
    attention: str = "self_attn"
    mlp: str = "mlp"

    def linear_names(self) -> list[str]:
        """Return the names of a block's linear layers, inside the block."""
        return [name for stage in self.stages for name in stage.layers]

    def all_linear_names(self, blocks: int) -> list[str]:
        """Return the full names of the linear layers of so many blocks."""
        return [block_prefix(index) + name for index in range(blocks) for name in self.linear_names()]


def block_prefix(index: int) -> str:
    """Return what the names of a block's tensors begin with."""
    return f"{BLOCKS}{index}."


def kv_shape(config: Any) -> tuple[int, int, int]:
    """Return (layers, KV heads, head_dim) of a model's KV cache."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, width


_ATTENTION_INPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_MLP_INPUTS = ("mlp.gate_proj", "mlp.up_proj")
# v_proj never takes a fold for o_proj: prefill modules write V, unscaled (DESIGN: "AWQ trap").
_OUTPUT = Stage(("self_attn.o_proj",), ends_half=True)
_DOWN = Stage(("mlp.down_proj",), "mlp.up_proj", ends_half=True)


def _split(attention_norm: str | None, mlp_norm: str | None, **traits: Any) -> Architecture:
    stages = (Stage(_ATTENTION_INPUTS, attention_norm), _OUTPUT, Stage(_MLP_INPUTS, mlp_norm), _DOWN)
    return Architecture(stages, **traits)


_LLAMA = _split("input_layernorm", "post_attention_layernorm")
_QWEN = replace(_LLAMA, masks_by_type=True)
_GEMMA = _split("input_layernorm", "pre_feedforward_layernorm", norm_offset=1.0, output_added=False, masks_by_type=True)
_OLMO2 = _split(None, None, output_added=False)
_LLAMA4 = Architecture(
    (
        Stage(_ATTENTION_INPUTS, "input_layernorm"),
        _OUTPUT,
        Stage(("feed_forward.gate_proj", "feed_forward.up_proj"), "post_attention_layernorm"),
        Stage(("feed_forward.down_proj",), "feed_forward.up_proj", ends_half=True),
    ),
    masks_by_type=True,
    mlp="feed_forward",
)
_PHI3 = Architecture(
    (
        Stage(("self_attn.qkv_proj",), "input_layernorm"),
        _OUTPUT,
        Stage(("mlp.gate_up_proj",), "post_attention_layernorm"),
        Stage(("mlp.down_proj",), "mlp.gate_up_proj", rows=(1, 2), ends_half=True),
    )
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _QWEN,
    "qwen3": _QWEN,
    "smollm3": _QWEN,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "llama4_text": _LLAMA4,
    "olmo2": _OLMO2,
    "phi3": _PHI3,
}

# Text models inside multimodal ones, and the plain model that computes the same of text.
TEXT_MODELS = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}


def architecture_of(model_type: str) -> Architecture:
    """Return the table's row for a model_type. Raises QsunError for any other, and for mixtures of experts."""
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    if "moe" in model_type or model_type in ("mixtral", "deepseek_v2", "deepseek_v3", "gpt_oss", "dbrx", "jamba"):
        raise QsunError(f"architecture {model_type!r} is a mixture of experts, which is not supported yet")
    raise QsunError(f"architecture {model_type!r} is not supported; known are {', '.join(ARCHITECTURES)}")
