"""The seam without a cache: one forward pass over the whole sequence in which each position has its own weights.

Positions before the last prompt token are computed with the prefill module's weights, the others with the decode
module's; attention is plain causal over all of them. Llama only, written out, in the precision of the weights.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qsun.runtime.logits import head_logits
from qsun.runtime.seam import SeamBatch, monolithic_hidden, seam_hidden


def seam_logits(prefill: Any, decode: Any, batch: SeamBatch) -> Tensor:
    """(B, R, vocabulary) logits of the decode model over `rest`, attending to what the prefill model wrote."""
    return head_logits(decode, seam_hidden(prefill, decode, batch))


def monolithic_logits(model: Any, batch: SeamBatch) -> Tensor:
    """The same from one model in one forward pass without a cache."""
    return head_logits(model, monolithic_hidden(model, batch))


def seam_reference(prefill: dict, decode: dict, config, tokens: list[int], prompt_tokens: int) -> Tensor:
    """(decode positions, vocabulary) logits.

    Args:
        prefill, decode: state dicts of Llama models.
        tokens: the whole sequence. prompt_tokens: n; t(n-1) is the first that decode is fed.
    """
    T, seam = len(tokens), prompt_tokens - 1
    ours = (torch.arange(T) < seam)[:, None]

    def project(x: Tensor, name: str) -> Tensor:
        return torch.where(ours, x @ prefill[name].T, x @ decode[name].T)

    def norm(x: Tensor, name: str) -> Tensor:
        weight = torch.where(ours, prefill[name], decode[name])
        return weight * x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    x = torch.where(ours, *(state["model.embed_tokens.weight"][torch.tensor(tokens)] for state in (prefill, decode)))
    rope = rotation(T, width, config.rope_parameters["rope_theta"]).to(x.dtype)
    unseen = torch.full((T, T), float("-inf"), dtype=x.dtype).triu(1)
    for index in range(config.num_hidden_layers):
        at = f"model.layers.{index}."
        h = norm(x, at + "input_layernorm.weight")
        q, k, v = (
            project(h, f"{at}self_attn.{letter}_proj.weight").view(T, -1, width).transpose(0, 1) for letter in "qkv"
        )
        q, k = turned(q, rope), turned(k, rope)
        k, v = (t.repeat_interleave(heads // groups, 0) for t in (k, v))
        scores = (q @ k.transpose(1, 2) / width**0.5 + unseen).softmax(-1)
        x = x + project((scores @ v).transpose(0, 1).reshape(T, -1), at + "self_attn.o_proj.weight")
        h = norm(x, at + "post_attention_layernorm.weight")
        h = F.silu(project(h, at + "mlp.gate_proj.weight")) * project(h, at + "mlp.up_proj.weight")
        x = x + project(h, at + "mlp.down_proj.weight")
    head = decode.get("lm_head.weight", decode["model.embed_tokens.weight"])
    return (norm(x, "model.norm.weight") @ head.T)[seam:]


def rotation(T: int, width: int, theta: float) -> Tensor:
    """(T, width / 2, 2, 2) rotation matrices, float64."""
    angle = torch.arange(T).double()[:, None] * theta ** (-torch.arange(0, width, 2).double() / width)
    return torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(T, width // 2, 2, 2)


def turned(x: Tensor, rope: Tensor) -> Tensor:
    """Halves of each head are the coordinates, as transformers lays them out."""
    pairs = torch.stack(x.chunk(2, -1), -1)
    return torch.cat(torch.einsum("tpij,htpj->htpi", rope, pairs).unbind(-1), -1)


def greedy_reference(prefill: dict, decode: dict, config, prompt: list[int], new_tokens: int) -> list[int]:
    """The answer, every token from the whole sequence anew."""
    tokens = list(prompt)
    for _ in range(new_tokens):
        tokens.append(int(seam_reference(prefill, decode, config, tokens, len(prompt))[-1].argmax()))
    return tokens[len(prompt) :]
