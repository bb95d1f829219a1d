"""The architecture as rules: which package may import which, no circles, small files, folders and functions."""

import ast
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.places import ROOT

LINKS = ("kernels", "eval", "cli")

# From the bottom up: a package imports its own modules and those of packages above it in this list.
PACKAGES = [
    "kernels.avx512",
    "kernels",
    "qsun",
    "qsun.demo",
    "qsun.model",
    "qsun.data",
    "qsun.runtime.tokens",
    "qsun.runtime",
    "qsun.quantization.methods",
    "qsun.quantization",
    "qsun.adapters",
    "qsun.engine.decode",
    "qsun.engine",
    "qsun.tuning",
    "qsun.serve.http",
    "qsun.serve.api.tools",
    "qsun.serve.api.bodies",
    "qsun.serve.api.answers",
    "qsun.serve.api",
    "qsun.serve.cluster",
    "qsun.serve.router.workers",
    "qsun.serve.router.exchange",
    "qsun.serve.router",
    "qsun.serve.ray.engine",
    "qsun.serve.ray",
    "qsun.serve",
    "qsun.vllm",
    "eval.output",
    "eval.tasks",
    "eval.load",
    "eval.speed",
    "eval.harness",
    "eval.report",
    "eval.simulate",
    "eval.study",
    "eval",
    "cli.terminal",
    "cli.bench",
    "cli",
]
KERNEL_IMPORTS = {
    "itertools",
    "torch",
    "triton",
    "qsun",
    "typing",
    "json",
    "functools",
    "pathlib",
    "collections",
    "dataclasses",
}
KERNEL_IMPORTS |= {"importlib", "contextlib", "ctypes", "llvmlite", "logging", "threading"}
LONGEST_FILE, LONGEST_FUNCTION, WIDEST_FOLDER = 300, 40, 14


def own_files():
    for top in ("kernels", "qsun", "eval", "cli"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).parts
            if "__pycache__" not in parts and not (parts[0] == "qsun" and parts[1] in LINKS):
                yield path


FILES = list(own_files())


def module_name(path):
    """kernels/layout.py -> kernels.layout; qsun/model/lora.py -> qsun.model.lora"""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def package_of(module):
    path = MODULES.get(module)
    return module if path is None or path.name == "__init__.py" else module.rpartition(".")[0]


def imported(path):
    """Modules of this repository that a file imports anywhere, for type checking or within functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: a relative import, which this test does not follow"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if as_module(name) in MODULES else node.module for name in whole]
        yield from (as_module(name) for name in names if name.partition(".")[0] == "qsun")


def test_imports_are_seen_wherever_they_stand(tmp_path):
    file = tmp_path / "some.py"
    file.write_text(
        "import torch, qsun.cli.main\nfrom qsun.kernels import layout\nfrom qsun import tune\n"
        "if TYPE_CHECKING:\n    from qsun.model.quantized import Quantized\n"
        "def f():\n    from qsun.eval.output.table import Table\n"
    )
    seen = {"cli.main", "kernels.layout", "qsun", "qsun.model.quantized", "eval.output.table"}
    assert set(imported(file)) == seen


def as_module(name):
    """The public name of a linked package, qsun.eval.tasks, as its folder at the top, eval.tasks."""
    return name.removeprefix("qsun.") if name.split(".")[1:2] and name.split(".")[1] in LINKS else name


def test_links_and_no_kernels_package():
    for name in LINKS:
        link = ROOT / "qsun" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name
    assert not (ROOT / "kernels" / "__init__.py").exists()  # it would shadow Hugging Face's kernels


def test_every_package_has_a_place():
    assert {package_of(module) for module in MODULES} <= set(PACKAGES)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_down(path):
    if path == ROOT / "qsun/__init__.py":
        return  # the public names, imported when they are first used
    here = package_of(module_name(path))
    for module in imported(path):
        if module == "qsun":
            continue  # the public names again
        there = package_of(module)
        assert PACKAGES.index(there) <= PACKAGES.index(here), f"{path} imports {module}"


def test_no_import_circles():
    graph = {module: set(imported(path)) - {module, "qsun"} for module, path in MODULES.items() if module != "qsun"}
    TopologicalSorter(graph).prepare()  # names the circle where there is one


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_and_functions_are_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not is_kernel(node):
            lines = code_lines(node)
            assert lines <= LONGEST_FUNCTION, f"{path}: {node.name} has {lines} lines"


def is_kernel(node):
    return any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def code_lines(node):
    """Of a function's body, without its signature and docstring: a command's options are documentation."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def test_folders_are_small():
    modules = Counter(path.parent for path in FILES if path.name != "__init__.py")
    assert {str(folder): count for folder, count in modules.items() if count > WIDEST_FOLDER} == {}


def test_tests_mirror_the_packages():
    """Beside them lie folders for what is not one package: other tools, devices, clients, and pretend engines."""
    beside = {"gpu", "oracles", "pretend_cuda", "structure", "serve/clients", "serve/ray/live"}
    folders = Counter(
        path.parent.relative_to(ROOT / "tests").as_posix() for path in (ROOT / "tests").rglob("test_*.py")
    )
    lost = {name for name in folders if not (ROOT / "qsun" / name).is_dir()}
    assert {name for name in lost if not any(f"{name}/".startswith(f"{place}/") for place in beside)} == set()
    assert {name: count for name, count in folders.items() if count > WIDEST_FOLDER} == {}


def test_kernels_need_only_torch_and_triton():
    for path in FILES:
        if path.is_relative_to(ROOT / "kernels"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
                assert {name.partition(".")[0] for name in names} <= KERNEL_IMPORTS, path


def test_core_does_not_print_or_read_the_environment():
    for path in FILES:
        if path.relative_to(ROOT).parts[0] == "cli" or path.parent.name == "demo":
            continue
        if path == ROOT / "qsun/vllm/__init__.py":
            continue  # vLLM passes nothing to a plugin; its switch can only be in the environment
        if path == ROOT / "qsun/serve/ray/engine/process.py":
            continue  # Ray gives an actor its GPUs in the environment, and vLLM must get them
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", path
            assert not (isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")), path
            assert not (isinstance(node, ast.alias) and node.name in ("environ", "getenv")), path
