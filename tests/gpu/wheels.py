"""List the wheels that `make gpu` needs on a machine without a network, pinned to what this environment has.

python tests/gpu/wheels.py [--have torch,triton] [--download FOLDER]: prints one requirement a line, or downloads them.
"""

import argparse
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

# What bench.py imports. `closure` adds what these require as they are installed here: torch's CUDA wheels only where
# this torch has CUDA. Peers are optional and often need a compiler.
WANTED = ["torch", "triton", "transformers", "accelerate", "safetensors", "numpy", "pydantic", "packaging", "pytest"]
WANTED += ["numba", "huggingface-hub", "PyYAML", "matplotlib"]
PEERS = ["gemlite", "humming-kernels"]
# pip takes a platform literally, and wheels are named after any of these.
TAGS = ["manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014", "manylinux_2_12"]
TAGS += ["manylinux2010", "manylinux_2_5", "manylinux1", "linux"]
PLATFORM = [*(f"--platform={tag}_x86_64" for tag in TAGS), "--only-binary=:all:", "--no-deps"]

NO_TORCH = """torch is listed, but not what its CUDA build requires (nvidia-*), as pip gets no dependencies (--no-deps).
Install torch with CUDA on that machine first, and say so: --have torch,triton."""


def normalized(name):
    """Return a package's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def closure(names, have=()):
    """Return {name: version} of packages and what they require here, without those in `have` and what only they need.

    Names are compared normalized.

    A version of None: it is not installed here, so the newest is taken.
    """
    found, waiting = {}, list(names)
    while waiting:
        name = normalized(waiting.pop())
        if name in found or name in have:
            continue
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            found[name] = None
            continue
        needs = [Requirement(text) for text in requires(name) or []]
        waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return dict(sorted(found.items()))


def lines(names, have=()):
    return [name if number is None else f"{name}=={number}" for name, number in closure(names, have).items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--have", default="", help="packages that the machine has, comma-separated")
    parser.add_argument("--peers", action="store_true", help=f"also {', '.join(PEERS)}")
    parser.add_argument("--download", metavar="FOLDER", help="run `pip download` into this folder")
    given = parser.parse_args()
    have = {normalized(name) for name in given.have.split(",")}
    if "torch" not in have:
        print(NO_TORCH, file=sys.stderr)
    wanted = lines([*WANTED, *(PEERS if given.peers else [])], have)
    print("\n".join(wanted))
    if given.download:
        python = ["--python-version", f"{sys.version_info[0]}.{sys.version_info[1]}"]
        command = [sys.executable, "-m", "pip", "download", "-d", given.download, *PLATFORM, *python, *wanted]
        sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
