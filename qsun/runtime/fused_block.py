"""A decode step of a whole decoder block in eight kernels on a GPU (ten in full precision, twelve in Gemma 2 and 3).

    norm -> q, k, v -> rotate, write KV -> attention -> o + residual -> norm -> SiLU(gate) * up -> down + residual

transformers' own block runs some forty. Only a step whose conditions all hold takes this way: one token a row on a GPU,
without gradients, over a cache of slots; every other call goes to the block itself.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qsun.kernels import packed_cuda
from qsun.model.architectures import Architecture, architecture_of
from qsun.runtime.fused_projections import GatedMLP, MergedPart
from qsun.runtime.quant_linear import QuantLinear

_DTYPES = (torch.bfloat16, torch.float16)  # that the kernels compute in


class FusedBlock(nn.Module):
    """Takes the place of a block and shares its parts, under their names.

    Args:
        window: of the layer's sliding attention; None: it sees every column.
    """

    def __init__(self, block: Any, layer: int, architecture: Architecture, window: int | None):
        super().__init__()
        for name, part in block.named_children():
            self.add_module(name, part)
        self._block = (block,)  # in a tuple, so that its parts are registered once
        self.layer, self.window, self.offset = layer, window, architecture.norm_offset
        attention = block.self_attn
        self.sandwiched = not architecture.output_added
        self.softcap = getattr(attention, "attn_logit_softcapping", None)
        self.scale, self.rotates = attention.scaling, bool(getattr(attention, "use_rope", True))
        self.width = attention.head_dim

    @property
    def block(self) -> Any:
        """The block itself."""
        return self._block[0]

    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
        cache = options.get("cache", options.get("past_key_values"))
        rotation: Any = options.get("position_embeddings")
        if args or not self._takes(hidden_states, cache, rotation):
            return self.block(hidden_states, *args, **options)
        with torch.cuda.device_of(hidden_states):  # Triton launches on the current device
            return self._step(hidden_states.flatten(0, 1), cache, rotation).view(hidden_states.shape)

    def _takes(self, x: Tensor, cache: Any, rotation: Any) -> bool:
        """Return whether this is a step of one token a row for the kernels, over a cache of slots of its dtype."""
        if not _one_token(x):
            return False
        slots = hasattr(cache, "lengths") and hasattr(cache, "buffers") and cache.view[0] == x.shape[0]
        return slots and x.dtype == cache.dtype and rotation[0].shape[-1] == self.width

    def _step(self, x: Tensor, cache: Any, rotation: tuple[Tensor, Tensor]) -> Tensor:
        from qsun.kernels import decode_cuda

        rows, columns = cache.view
        keys, values, *scales = (buffer[:rows, :, :columns] for buffer in cache.buffers[self.layer])
        kv_scales = (scales[0], scales[1]) if scales else None
        if scales:
            keys, values = keys.view(torch.float8_e4m3fn), values.view(torch.float8_e4m3fn)
        attention: Any = self.self_attn
        norms = None
        if hasattr(attention, "q_norm"):
            norms = (attention.q_norm.weight, attention.k_norm.weight, _eps(attention.q_norm))
        cos, sin = (part.expand(rows, 1, self.width).reshape(rows, self.width).contiguous() for part in rotation)
        qkv = attention.q_proj.merged.layer(self._norm(x, self.input_layernorm))
        at = cache.lengths[:rows]
        turned = (cos, sin) if self.rotates else None
        q = decode_cuda.rotate_and_store_kv(qkv, turned, norms, keys, values, at, kv_scales, self.offset)
        options: Any = {"softcap": self.softcap, "kv_scales": kv_scales}
        seen = decode_cuda.decode_attention(q, keys, values, at, self.scale, self.window, **options)
        mlp: Any = self.mlp
        if self.sandwiched:
            return self._sandwiched(attention.o_proj(seen), x, mlp)
        normed, x = self._add_and_norm(attention.o_proj, seen, x, self.post_attention_layernorm)
        inner = self._gated(mlp.gate_up, normed)
        down = mlp.down_proj
        return down.plus(inner, x) if isinstance(down, QuantLinear) else x + down(inner)

    def _sandwiched(self, attended: Tensor, x: Tensor, mlp: Any) -> Tensor:
        """Return the block's output where each half has a norm behind it as well, as in Gemma."""
        from qsun.kernels.decode_cuda import add_rms_norm, silu_mul

        attended = self._norm(attended, self.post_attention_layernorm)
        before: Any = self.pre_feedforward_layernorm
        normed, x = add_rms_norm(attended, x, before.weight, _eps(before), self.offset)
        inner = silu_mul(mlp.gate_proj.merged.layer(normed), gelu=True)
        return x + self._norm(mlp.down_proj(inner), self.post_feedforward_layernorm)

    def _norm(self, x: Tensor, norm: Any) -> Tensor:
        from qsun.kernels.decode_cuda import rms_norm

        return rms_norm(x, norm.weight, _eps(norm), self.offset)

    def _add_and_norm(self, layer: Any, x: Tensor, residual: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
        """Return (norm of the sum, sum) of the layer's product and the residual."""
        from qsun.kernels.decode_cuda import add_rms_norm

        if isinstance(layer, QuantLinear):
            total = layer.plus(x, residual)
            return self._norm(total, norm), total
        return add_rms_norm(layer(x), residual, norm.weight, _eps(norm), self.offset)

    def _gated(self, gate_up: Any, x: Tensor) -> Tensor:
        from qsun.kernels.decode_cuda import silu_mul

        return gate_up.silu_mul(x) if isinstance(gate_up, QuantLinear) else silu_mul(gate_up(x))


class FusedNorm(nn.Module):
    """Takes the place of a model's last norm: one kernel for a step of one token a row."""

    def __init__(self, norm: Any, offset: float):
        super().__init__()
        self.weight, self.variance_epsilon, self.offset = norm.weight, norm.variance_epsilon, offset
        self._plain = type(norm).forward  # which reads the first two

    def forward(self, x: Tensor) -> Any:
        if not _one_token(x):
            return self._plain(self, x)
        from qsun.kernels.decode_cuda import rms_norm

        with torch.cuda.device_of(x):
            return rms_norm(x.contiguous(), self.weight, self.variance_epsilon, self.offset)


def _one_token(x: Tensor) -> bool:
    """Return whether x (rows, tokens, width) has one token a row, on a GPU, in 16 bits and without gradients."""
    plain = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return x.is_cuda and x.dtype in _DTYPES and x.shape[1] == 1 and not plain


def fuse_blocks(model: Any, config: Any) -> None:
    """Replace the blocks of a transformers model on a GPU whose projections are merged, and its last norm, in place.

    Blocks of OLMo 2 (whose norms of queries and keys span all heads), with projections merged in the checkpoint (Phi 3)
    or with heads that the kernels do not support stay as they are, and all blocks where the kernels do not run.
    """
    architecture, device = architecture_of(config.model_type), model.model.embed_tokens.weight.device
    if config.model_type == "olmo2" or device.type != "cuda" or not packed_cuda.available(device):
        return
    for layer, block in enumerate(model.model.layers):
        if _fusible(block, config):
            kind = config.layer_types[layer] if architecture.masks_by_type else "all"
            window = None if kind == "full_attention" else getattr(config, "sliding_window", None)
            model.model.layers[layer] = FusedBlock(block, layer, architecture, window)
    if isinstance(model.model.layers[-1], FusedBlock) and architecture.output_added:
        model.model.norm = FusedNorm(model.model.norm, architecture.norm_offset)


def all_fused(model: Any) -> bool:
    """Return whether steps of one token a row go through the kernels in every block, so that nothing reads a mask."""
    weight = model.model.embed_tokens.weight
    able = weight.device.type == "cuda" and weight.dtype in _DTYPES
    return able and all(isinstance(layer, FusedBlock) for layer in model.model.layers)


def _fusible(block: Any, config: Any) -> bool:
    from qsun.kernels.decode_cuda import HEAD_DIMS

    attention = block.self_attn
    q: Any = getattr(attention, "q_proj", None)
    mlp: Any = getattr(block, "mlp", None)
    if not isinstance(q, MergedPart) or attention.head_dim not in HEAD_DIMS:
        return False
    if architecture_of(config.model_type).output_added:
        return isinstance(mlp, GatedMLP)
    capped = getattr(attention, "attn_logit_softcapping", None) is not None  # Gemma 3 has the setting and ignores it
    gelu = getattr(config, "hidden_activation", None) == "gelu_pytorch_tanh" and isinstance(mlp.gate_proj, MergedPart)
    return gelu and not (capped and config.model_type == "gemma3_text")


def _eps(norm: Any) -> float:
    return norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
