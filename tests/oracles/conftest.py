"""Fixtures of the oracle tests: modules that qsun made, and other tools in their own environments."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import qsun
from tests.oracles.bases import make_base, random_tokens, save_tokens
from tests.places import ROOT

HERE = Path(__file__).parent
ENVIRONMENTS = Path(os.environ.get("QSUN_ORACLES_DIR", ROOT / ".oracles"))
PROBE_SECONDS = 400
BASE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROBE_SETTINGS = {
    "OMP_NUM_THREADS": "1",  # tiny products: threads would only wait for each other
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "GPTQMODEL_CPU_WORKERS": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}

Build = Callable[..., Path]
Probe = Callable[..., np.ndarray]


class ProbeFailedError(Exception):
    """The other tool failed; the message is the end of what it printed."""


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """build(base, **settings): a module that qsun quantizes, made once; bits=16: the base itself.

    base: "fp32", "bf16" or "demo".
    """
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("modules")
    calibration = save_tokens(root / "calibration.npy", random_tokens(8, 64, seed=1))
    made: dict[str, Path] = {}

    def once(key: str, make: Callable[[Path], object]) -> Path:
        if key not in made:
            made[key] = root / f"module{len(made)}"
            make(made[key])
        return made[key]

    def base_of(name: str) -> Path | str:
        return name if name == "demo" else once(name, lambda directory: make_base(directory, BASE_DTYPES[name]))

    def build_module(base: str, **settings: object) -> Path:
        if settings.get("bits") == 16:
            return base_of(base)
        settings = {"method": "gptq", "group_size": 32, "samples": 8, "seq_len": 64, "sweeps": 1} | settings
        config = qsun.QuantConfig(**settings)
        source, data = base_of(base), None if base == "demo" else calibration
        return once(f"{base} {config}", lambda out: qsun.quantize(source, out, config, data, "cpu"))

    return build_module


@pytest.fixture(scope="session")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    """probe(environment, script, *arguments): what the script, run there, saves to its first argument."""
    root = tmp_path_factory.mktemp("probes")

    def run(environment: str, script: str, *arguments: object) -> np.ndarray:
        python = ENVIRONMENTS / environment / "bin" / "python"
        if not python.exists():
            pytest.skip(f"no environment {environment!r}; `make oracles` makes it")
        out = root / f"{len(list(root.iterdir()))}.npy"
        command = [str(python), str(HERE / "probes" / script), str(out), *map(str, arguments)]
        settings = os.environ | PROBE_SETTINGS
        done = subprocess.run(
            command, env=settings, cwd=root, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False
        )
        if done.returncode:
            raise ProbeFailedError((done.stdout + done.stderr)[-6000:])
        return np.load(out, allow_pickle=False)

    return run


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 4 x 48 token ids for comparisons of logits; they are not those of the calibration."""
    return save_tokens(tmp_path_factory.mktemp("tokens") / "tokens.npy", random_tokens(4, 48, seed=7))


@pytest.fixture(scope="session")
def demo_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for the packaged base, whose vocabulary is smaller."""
    return save_tokens(tmp_path_factory.mktemp("tokens") / "demo.npy", random_tokens(4, 48, seed=8) % 125 + 3)
