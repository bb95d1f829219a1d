"""A decode module and prefill modules that answer differently, small enough to decode on a CPU in float32."""

import copy
import shutil

import pytest
import torch

import qsun
from qsun.demo import base_directory as demo_directory
from qsun.engine.config import EngineConfig
from qsun.engine.engine import Engine
from tests.tiny_models import build_model

NAMES = ("math", "code", "tool")
KV_BYTES_PER_TOKEN = 2 * 2 * 2 * 16 * 4  # K and V, layers, heads, head_dim, float32


@pytest.fixture(scope="session")
def base_directory(tmp_path_factory):
    """A random llama whose greedy answers vary, with the demo base's tokenizer and chat template."""
    directory = build_model(tmp_path_factory.mktemp("serve") / "base", "llama", max_position_embeddings=512)
    for pattern in ("tokenizer*", "chat_template*"):
        for file in demo_directory().glob(pattern):
            shutil.copyfile(file, directory / file.name)
    return directory


@pytest.fixture(scope="session")
def decode(base_directory):
    return qsun.load_decode(base_directory, dtype="float32")


@pytest.fixture(scope="session")
def prefills(decode, base_directory):
    """Three modules by name: the base with different noise on its weights."""
    base = qsun.load_prefill(base_directory, decode=decode, dtype="float32")
    made = {}
    for seed, name in enumerate(NAMES):
        model = copy.deepcopy(base.model)
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=random))
        made[name] = qsun.PrefillModule(model, base.directory)
    return made


@pytest.fixture
def make_engine(decode, prefills):
    def make(watch=None, kv_tokens=50_000, **settings):
        engine = Engine(decode, EngineConfig(kv_bytes=kv_tokens * KV_BYTES_PER_TOKEN, **settings), watch)
        for name, module in prefills.items():
            engine.add_module(name, module)
        return engine

    return make


def run_until_idle(engine, most_steps=10_000):
    """Updates by request."""
    updates = {}
    for _ in range(most_steps):
        for update in engine.step():
            updates.setdefault(update.request, []).append(update)
        if engine.idle:
            return updates
    raise AssertionError("the engine does not finish")


def tokens_of(updates):
    return [token for update in updates for token in update.tokens]
