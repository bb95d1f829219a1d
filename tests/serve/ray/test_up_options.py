"""What `qsun up --ray` makes of its options and of Ray's variables; needs no Ray."""

import os

import pytest
from typer.testing import CliRunner

from qsun.cli import up as command
from qsun.cli.main import app
from qsun.errors import QsunError

VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@pytest.fixture
def environment(monkeypatch):
    """environment(**variables): Ray's variables once `qsun up --ray` has seen these."""

    def seen(**variables):
        monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in VARIABLES} | variables)
        command._require_ray_token()
        return {name: os.environ[name] for name in VARIABLES if name in os.environ}

    return seen


@pytest.mark.parametrize(
    "given", [{"RAY_AUTH_TOKEN": "mine"}, {"RAY_AUTH_TOKEN_PATH": "/t"}, {"RAY_AUTH_TOKEN": "m", "RAY_AUTH_MODE": ""}]
)
def test_a_token_alone_is_required_too(environment, given):
    assert environment(**given) == given | {"RAY_AUTH_MODE": "token"}


def test_without_a_token_there_is_a_new_one(environment):
    first, second = environment(), environment(RAY_AUTH_TOKEN="")
    assert first["RAY_AUTH_MODE"] == second["RAY_AUTH_MODE"] == "token"
    assert len({first["RAY_AUTH_TOKEN"], second["RAY_AUTH_TOKEN"]}) == 2
    assert len(first["RAY_AUTH_TOKEN"]) == len(second["RAY_AUTH_TOKEN"]) == 64


def test_a_mode_of_the_users_own_stays(environment, capsys):
    assert environment(RAY_AUTH_MODE="token") == {"RAY_AUTH_MODE": "token"}
    assert capsys.readouterr().err == ""
    assert environment(RAY_AUTH_MODE="Disabled") == {"RAY_AUTH_MODE": "Disabled"}
    assert "can run code here" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kuberay"], "--kuberay only prints"),
        (["--kuberay", "--address", "http://head:8265"], "--kuberay only prints"),
        (["--print", "--address", "http://head:8265"], "--address http://head:8265 is where to deploy"),
    ],
)
def test_options_that_would_be_ignored(options, message, tmp_path):
    done = CliRunner().invoke(app, ["up", str(tmp_path / "cluster.yaml"), "--ray", *options])
    assert isinstance(done.exception, QsunError)
    assert message in str(done.exception)
