"""Fixtures: tiny models, tiny calibration data, and the command line as a function."""

import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qsun.quantization import report
from tests.tiny_models import SEQUENCE, build_model, random_tokens

pytest_plugins = ["tests.engine_rig", "tests.pretend_cuda.plugin"]


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Sums of several threads depend on their number; a session's fixtures, tests and children must agree on it."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True, scope="session")
def heard_sigint():
    """A shell's background jobs ignore SIGINT, and hand that on to what they start; tests send it to commands."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def plot_errors():
    """Leave errors.png out, which takes half of a tiny run's time; yields the function that draws it."""
    with pytest.MonkeyPatch.context() as patch:
        drawn = report.plot_errors
        patch.setattr(report, "plot_errors", lambda *_: None)
        yield drawn


@pytest.fixture
def pictures(plot_errors, monkeypatch):
    """Draw errors.png after all."""
    monkeypatch.setattr(report, "plot_errors", plot_errors)


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


@pytest.fixture
def pipe() -> Iterator[Callable[..., str]]:
    """pipe(text): the name of a pipe that gives this text once, as a shell's <(command) has one."""
    readers = []

    def make(text: str = "") -> str:
        reader, writer = os.pipe()
        os.write(writer, text.encode())
        os.close(writer)
        readers.append(reader)
        return f"/dev/fd/{reader}"

    yield make
    for reader in readers:
        os.close(reader)


@dataclass(frozen=True)
class Answer:
    """The result of a command line."""

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
