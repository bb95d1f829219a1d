"""The wheel holds what the tree holds: code through the links at the top, data, and the marker of its types."""

import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.places import ROOT

FOLDERS = {"qsun": "", "kernels": "qsun/", "eval": "qsun/", "cli": "qsun/"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Files in a wheel that is built from a copy, as a build leaves folders behind in its tree."""
    tree = tmp_path_factory.mktemp("tree")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / file, tree / file)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "wheels", "."]
    subprocess.run(build, cwd=tree, check=True, capture_output=True, timeout=300)
    return set(zipfile.ZipFile(next((tree / "wheels").glob("*.whl"))).namelist())


@pytest.mark.slow
def test_the_wheel_holds_every_file(wheel):
    held = set()
    for folder, prefix in FOLDERS.items():
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        held |= {prefix + path.relative_to(ROOT).as_posix() for path in files}
    assert held - wheel == set()
    assert "qsun/py.typed" in wheel
