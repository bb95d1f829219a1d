"""List the wheels that `make gpu` needs on a machine without a network, pinned to what this environment has.

python tests/gpu/wheels.py [--have torch,triton] [--download FOLDER]: prints one requirement a line, or downloads them.
"""

import argparse
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

# What bench.py imports: torch's own packages come with it. Peers are optional and often need a compiler.
WANTED = ["torch", "triton", "transformers", "accelerate", "safetensors", "numpy", "pydantic", "packaging", "pytest"]
WANTED += ["numba", "huggingface-hub", "PyYAML", "matplotlib"]
PEERS = ["gemlite", "humming-kernels"]
PLATFORM = ["--platform", "manylinux_2_28_x86_64", "--only-binary=:all:", "--no-deps"]


def closure(names, have=()):
    """Return {name: version} of packages and what they require here, without those in `have` and what only they need.

    A version of None: it is not installed here, so the newest is taken.
    """
    found, waiting = {}, list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
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
    have = {name.strip().lower() for name in given.have.split(",")}
    wanted = lines([*WANTED, *(PEERS if given.peers else [])], have)
    print("\n".join(wanted))
    if given.download:
        python = ["--python-version", f"{sys.version_info[0]}.{sys.version_info[1]}"]
        command = [sys.executable, "-m", "pip", "download", "-d", given.download, *PLATFORM, *python, *wanted]
        sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
