"""Tiny models of every supported family, tiny calibration data, and the command line as a function."""

import json
import logging
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 128  # as the packaged demo base, whose tokenizer is lent to the tiny models
SEQUENCE = 24  # longer than the sliding windows below
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_MIXED_LAYERS = ["sliding_attention", "full_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "gemma2": {
        "head_dim": 32,
        "sliding_window": 7,
        "layer_types": _MIXED_LAYERS,
        "attn_logit_softcapping": 3.0,  # low enough to bend the logits of a tiny model
        "final_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 32,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "head_dim": 32,
        "sliding_window": 7,
        "layer_types": _MIXED_LAYERS,
        "query_pre_attn_scalar": 32,
        "tie_word_embeddings": True,
    },
    "phi3": {},
    "smollm3": {"no_rope_layers": [1, 0], "tie_word_embeddings": True},
    "olmo2": {},
}


def build_model(
    directory: Path, family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> Path:
    """Save a random model of a family; norms and biases are random too, so that none of them can go missing."""
    config = AutoConfig.for_model(family, **(_SIZES | FAMILIES[family] | changes))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * (0.1 if name.endswith("bias") else 0.2))
    model.to(dtype).save_pretrained(directory)
    return directory


def reference(directory: Path) -> Any:
    """transformers' own model in float32. Eager attention, as its fused one ignores Gemma 2's soft cap."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


def random_tokens(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """(rows, columns) int64 token ids, none of them special."""
    return np.random.default_rng(seed).integers(3, VOCAB, (rows, columns))


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prompt_rows(count: int) -> list[dict[str, str]]:
    """Prompts and responses of different lengths."""
    return [{"prompt": "abcdefghijkl"[: 3 + i % 7], "response": "zyxwvuts"[: 2 + i % 5]} for i in range(count)]


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Sums of several threads depend on their number; a session's fixtures and tests must agree on it."""
    torch.set_num_threads(1)


@pytest.fixture
def no_picture(monkeypatch):
    """Leave errors.png out, which takes half of a tiny run's time."""
    monkeypatch.setattr("qsun.report.plot_errors", lambda *_: None)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Callable[..., Path]:
    """Factory: tiny_model(family, dtype, **config changes) -> directory. Made once; copy it before damaging it."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        key = repr((family, dtype, sorted(changes.items())))
        if key not in made:
            made[key] = build_model(tmp_path_factory.mktemp(family) / "base", family, dtype, **changes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def demo_tokenizer():
    from transformers import AutoTokenizer

    from qsun.demo import base_directory

    return AutoTokenizer.from_pretrained(base_directory())


@pytest.fixture(scope="session")
def talking_model(tiny_model, tmp_path_factory) -> Path:
    """A tiny bfloat16 llama with the demo base's tokenizer and chat template."""
    from qsun.demo import base_directory

    directory = tmp_path_factory.mktemp("talking") / "base"
    shutil.copytree(tiny_model("llama", torch.bfloat16), directory)
    for pattern in ("tokenizer*", "chat_template*"):
        for file in base_directory().glob(pattern):
            shutil.copyfile(file, directory / file.name)
    return directory


@pytest.fixture(scope="session")
def token_file(tmp_path_factory) -> Path:
    """Calibration: 8 random sequences."""
    path = tmp_path_factory.mktemp("calibration") / "tokens.npy"
    np.save(path, random_tokens(8, SEQUENCE))
    return path


@dataclass(frozen=True)
class Answer:
    """What a command line gave."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys, monkeypatch) -> Callable[..., Answer]:
    """Run `qsun ...` in this process, through the same `main` as the installed command."""
    from qsun.cli.main import main

    logger = logging.getLogger("qsun")
    before = (logger.handlers, logger.level, logger.propagate)

    def run(*arguments: Any) -> Answer:
        monkeypatch.setattr(sys, "argv", ["qsun", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as leave:
            code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    yield run
    logger.handlers, logger.level, logger.propagate = before
