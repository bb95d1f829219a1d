"""The rules that keep the house in order: links, one-way imports, small files."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ["kernels", "qsun", "eval", "cli"]
SOURCES = [p for layer in LAYERS for p in sorted((ROOT / layer).rglob("*.py")) if "__pycache__" not in p.parts]
OWN = [p for p in SOURCES if not (p.is_relative_to(ROOT / "qsun") and p.relative_to(ROOT / "qsun").parts[0] in LAYERS)]


def test_links_and_no_kernels_package():
    for name in ("kernels", "eval", "cli"):
        link = ROOT / "qsun" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name
    assert not (ROOT / "kernels" / "__init__.py").exists()  # it would shadow Hugging Face's kernels


def layer_of(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else "qsun"


@pytest.mark.parametrize("path", OWN, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way_and_files_are_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    here = LAYERS.index(path.relative_to(ROOT).parts[0])
    for node in ast.walk(ast.parse(text)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        for name in names:
            if name.split(".")[0] == "qsun":
                assert LAYERS.index(layer_of(name)) <= here, f"{path} imports {name}"
            elif here == 0:
                assert name.split(".")[0] in {
                    "torch",
                    "typing",
                    "triton",
                    "json",
                    "functools",
                    "pathlib",
                    "collections",
                    "dataclasses",
                    "importlib",
                }
        if isinstance(node, ast.FunctionDef) and not any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
            assert node.end_lineno - node.lineno < 75, f"{path}: {node.name} is long"


def test_core_does_not_print_or_read_the_environment():
    for path in OWN:
        if path.relative_to(ROOT).parts[0] in ("cli",) or path.parent.name == "demo":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", path
            assert not (isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")), path
