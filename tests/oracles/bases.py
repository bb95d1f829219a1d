"""The bases and calibration data that the oracle tests quantize: small, random and reproducible."""

import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 512


def make_base(directory: Path, dtype: torch.dtype) -> Path:
    """A random Llama with grouped-query attention. Its head is scaled up so that greedy choices are clear."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.08,
    )
    torch.manual_seed(2)
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data.mul_(4)
    model.to(dtype).save_pretrained(directory)
    return directory


def random_tokens(rows: int, columns: int, seed: int) -> np.ndarray:
    """(rows, columns) int64 token ids, none of them special."""
    return np.random.default_rng(seed).integers(3, VOCAB, (rows, columns))


def save_tokens(path: Path, tokens: np.ndarray) -> Path:
    np.save(path, tokens, allow_pickle=False)
    return path


def with_own_head(directory: Path, out: Path) -> Path:
    """A copy of a module with tied embeddings that holds its head as a tensor of its own."""
    shutil.copytree(directory, out)
    tensors = load_file(out / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out
