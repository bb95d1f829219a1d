"""A missing optional package is one line that says what to install."""

import sys

import pytest

from qsun.cli.terminal import extras
from tests.places import ROOT


@pytest.mark.parametrize(
    ("package", "modules", "command", "extra"),
    [
        (
            "simpy",
            ("qsun.eval.simulate.run", "qsun.eval.simulate.simulation"),
            ("simulate", "--curves", "computed:llama-3.1-8b"),
            "simulate",
        ),
        ("httpx", ("qsun.eval.load.client",), ("bench", "serve", "http://127.0.0.1:9", "--rate", "1"), "serve"),
        ("lm_eval", ("qsun.eval.harness.lm",), ("lm-eval", "--tasks", "qsun_math"), "eval"),
        (
            "lm_eval",
            ("qsun.eval.harness.run", "qsun.eval.report.evaluation"),
            ("eval", "--decode", "demo", "--tasks", "qsun_math", "-o", "out"),
            "eval",
        ),
    ],
)
def test_a_missing_package_is_one_line(cli, monkeypatch, tmp_path, package, modules, command, extra):
    monkeypatch.chdir(tmp_path)
    loaded = [name for name in sys.modules if name.partition(".")[0] == package]
    loaded += [name for name in sys.modules if name.startswith(("qsun.eval.simulate", "qsun.eval.load"))]
    for name in [*loaded, *modules]:  # what holds what it imported, too
        parent, _, child = name.rpartition(".")
        if name in sys.modules and hasattr(sys.modules.get(parent), child):  # it gets its attribute back as well
            monkeypatch.setattr(sys.modules[parent], child, sys.modules[name])
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    answer = cli(*command)
    assert answer.code == 2
    assert answer.err.splitlines() == [f"error: {package} is not installed; pip install 'qsun[{extra}]'"]
    assert not list(tmp_path.iterdir())


def test_a_module_of_a_package_names_the_packages_extra():
    missing = ModuleNotFoundError("No module named 'starlette'", name="starlette.types")
    assert extras.missing_package(missing) == "starlette is not installed; pip install 'qsun[serve]'"


def test_a_package_of_no_extra_is_not_explained():
    assert extras.missing_package(ModuleNotFoundError("x", name="surely_not")) is None


def test_every_extra_exists_and_names_its_packages():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name, packages in extras._EXTRAS.items():
        listed = " ".join(extra[name]).replace("-", "_")
        assert all(package in listed for package in packages), name
