"""The pages name files and objects that exist."""

import importlib
import re

import pytest

from tests.places import ROOT

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]


def files(page):
    return re.findall(r"(?:qsun|kernels|eval|cli|tests)/[\w/-]+\.(?:py|json|yaml)\b", (ROOT / page).read_text())


def names(page):
    found = re.findall(r"(?<![\w.])qsun(?:\.[a-zA-Z_]\w*)+\b(?!/)", (ROOT / page).read_text())
    return [name for name in found if not name.endswith((".json", ".partial"))]


def test_files_and_names_are_found():
    assert len({path for page in PAGES for path in files(page)}) > 30
    assert {"qsun.quantize", "qsun.generate", "qsun.load_decode"} <= {*names("README.md")}


@pytest.mark.parametrize("page", PAGES)
def test_files_exist(page):
    for path in files(page):
        assert (ROOT / path).exists(), path


def test_files_of_the_flows_exist():
    """architecture.md names a folder once, and then files by their own names."""
    own = {path.name for top in ("qsun", "kernels", "eval", "cli") for path in (ROOT / top).rglob("*.py")}
    assert set(re.findall(r"`(?:[\w]+/)*(\w+\.py)`", (ROOT / "docs/architecture.md").read_text())) <= own | {
        "__init__.py",
        "test_imports.py",
    }


@pytest.mark.parametrize("page", PAGES)
def test_python_names_exist(page):
    for name in names(page):
        assert resolves(name), name


def examples(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_what_examples_import_exists(page):
    for body in examples(page):
        exec("\n".join(line for line in body.splitlines() if line.startswith(("import ", "from "))), {})  # noqa: S102


def test_the_example_of_a_simulation_runs(capsys):
    (body,) = examples("docs/capacity.md")
    exec(body, {})  # noqa: S102
    assert capsys.readouterr().out


def resolves(name):
    """Whether the longest part that is a module has the rest as attributes."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[length:]:
            found = getattr(found, attribute, None)
        return found is not None
    return False
