"""The Triton kernels' numerics without a GPU. The interpreter replaces triton.jit, so it gets a process of its own."""

import os
import subprocess
import sys

import pytest

from tests.places import ROOT

pytest.importorskip("triton")


SLOW = pytest.param("interpreted_products.py", "slow", marks=pytest.mark.slow)


FAST = [(f"interpreted_{name}.py", "not slow") for name in ("products", "decode", "lora", "loops")]


@pytest.mark.parametrize(("name", "marker"), [*FAST, SLOW])
def test_kernels_in_the_interpreter(name, marker):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    options = ("-q", "--noconftest", "-p", "no:cacheprovider", "-m", marker, f"tests/kernels/{name}")
    command = [sys.executable, "-m", "pytest", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
