"""What `qsun up` makes of its options, its file and Ray's variables; needs no Ray."""

import json
import os
import shutil
import signal
import sys

import pytest
import yaml

from qsun.cli import up as command
from qsun.errors import QsunError
from qsun.serve.ray.engine.environment import check_environment
from qsun.serve.ray.signals import UpSignals

VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


@pytest.fixture
def environment(monkeypatch):
    """environment(**variables): Ray's variables once `qsun up` has seen these."""

    def seen(**variables):
        monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in VARIABLES} | variables)
        command._keep_ray_private()
        return {name: os.environ[name] for name in VARIABLES if name in os.environ}

    return seen


@pytest.mark.parametrize(
    "given", [{"RAY_AUTH_TOKEN": "mine"}, {"RAY_AUTH_TOKEN_PATH": "/t"}, {"RAY_AUTH_TOKEN": "m", "RAY_AUTH_MODE": ""}]
)
def test_a_token_alone_is_required_too(environment, given):
    assert environment(**given) == given | LOOPBACK | {"RAY_AUTH_MODE": "token"}


def test_without_a_token_there_is_a_new_one(environment):
    first, second = environment(), environment(RAY_AUTH_TOKEN="")
    assert first["RAY_AUTH_MODE"] == second["RAY_AUTH_MODE"] == "token"
    assert len({first["RAY_AUTH_TOKEN"], second["RAY_AUTH_TOKEN"]}) == 2
    assert len(first["RAY_AUTH_TOKEN"]) == len(second["RAY_AUTH_TOKEN"]) == 64


def test_a_mode_of_the_users_own_stays(environment, capsys):
    assert environment(RAY_AUTH_MODE="token") == LOOPBACK | {"RAY_AUTH_MODE": "token"}
    assert capsys.readouterr().err == ""
    assert environment(RAY_AUTH_MODE="Disabled") == LOOPBACK | {"RAY_AUTH_MODE": "Disabled"}
    assert "can run code as you" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kuberay"], "--kuberay only prints"),
        (["--kuberay", "--address", "http://head:8265"], "--kuberay only prints"),
        (["--print", "--address", "http://head:8265"], "--address http://head:8265 is where to deploy"),
    ],
)
def test_options_that_would_be_ignored(options, message, tmp_path, cli):
    answer = cli("up", tmp_path / "cluster.yaml", *options)
    assert answer.code == 2
    assert message in answer.err


@pytest.fixture
def cluster_file(tmp_path):
    """cluster_file(**changes): two decode workers, one prefill worker, all of the demo base."""

    def write(**changes):
        values = {
            "listen": {"port": 0},
            "decode": {"module": "demo", "workers": 2},
            "models": {"math": {"module": "demo", "workers": 1}},
            "launch": {"device": "cpu", "kernels": "vllm"},
        }
        path = tmp_path / "cluster.yaml"
        path.write_text(yaml.safe_dump(values | changes))
        return path

    return write


def test_print_shows_what_would_be_deployed(cluster_file, cli):
    answer = cli("up", cluster_file(), "--print")
    assert answer.code == 0
    shown = yaml.safe_load(answer.out)
    assert shown == json.loads(cli("up", cluster_file(), "--print", "--json").out)
    decode, math, ingress = shown["applications"]
    assert [app["route_prefix"] for app in (decode, math, ingress)] == [None, None, "/"]
    assert decode["args"]["engine"]["served_name"].startswith("qsun-")
    assert decode["deployments"] == [{"name": "Engine", "num_replicas": 2}]


def test_modules_of_two_dtypes_are_computed_in_that_of_the_decode_module(cluster_file, cli, talking_model, tmp_path):
    shutil.copytree(talking_model, tmp_path / "math")
    settings = tmp_path / "math" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"dtype": "float16"}))
    file = cluster_file(
        decode={"module": str(talking_model), "workers": 1}, models={"math": {"module": "math", "workers": 1}}
    )
    decode, math, _ = json.loads(cli("up", file, "--print", "--json").out)["applications"]
    assert decode["args"]["engine"]["launch"]["dtype"] == math["args"]["engine"]["launch"]["dtype"] == "bfloat16"


def test_without_ray_one_line_names_the_extra(cluster_file, cli, monkeypatch, tmp_path):
    monkeypatch.setattr("qsun.serve.ray.engine.environment.check_environment", lambda *_: None)
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda _: None)
    answer = cli("up", cluster_file(), "--logs", tmp_path / "logs")
    assert answer.code == 2
    assert answer.err == "error: ray is not installed; pip install 'qsun[ray]'\n"
    assert not (tmp_path / "logs").exists()


def test_an_environment_without_nixl_is_enough_for_engines_that_transfer_nothing(tmp_path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    environment = {"PYTHONPATH": str(tmp_path)}
    check_environment(sys.executable, "vllm", environment, transfers=False)
    with pytest.raises(QsunError, match="has no nixl"):
        check_environment(sys.executable, "vllm", environment, transfers=True)


def test_an_environment_without_vllm(cluster_file, cli, tmp_path):
    file = cluster_file(launch={"device": "cpu", "environment": {"PYTHONPATH": ""}})
    answer = cli("up", file, "--logs", tmp_path / "logs")
    assert answer.code == 2
    assert f"launch.python {sys.executable} has no vllm; install vLLM there, or name another environment" in answer.err
    assert "cannot be run: No such file" in cli("up", cluster_file(launch={"python": "/nowhere/python"})).err


def test_the_environment_is_checked_again_when_the_file_has_changed(cluster_file, cli, monkeypatch, tmp_path):
    pytest.importorskip("ray.serve", reason="needs Ray: pip install 'qsun[ray]'")
    checked = []

    def serve_here(_cluster, _planned, _token, read, *_):
        cluster_file(launch={"device": "cpu", "kernels": "vllm", "python": "/other/python"})
        read()

    monkeypatch.setattr(command, "_keep_ray_private", lambda: None)
    monkeypatch.setattr("qsun.serve.ray.local.serve_here", serve_here)
    monkeypatch.setattr(
        "qsun.serve.ray.engine.environment.check_environment", lambda python, *rest: checked.append((python, rest[-1]))
    )
    assert cli("up", cluster_file(), "--logs", tmp_path / "logs").code == 0
    assert checked == [(sys.executable, True), ("/other/python", True)]


def test_an_invalid_key_is_reported_before_anything_starts(cluster_file, cli, tmp_path):
    (tmp_path / "keys").write_text("short\n")
    answer = cli("up", cluster_file(listen={"port": 0, "api_keys": "keys"}), "--logs", tmp_path / "logs")
    assert answer.code == 2
    assert "an API key of 5 characters is invalid" in answer.err
    assert not (tmp_path / "logs").exists()


def test_running_workers_are_for_qsun_route(cluster_file, cli):
    answer = cli("up", cluster_file(decode={"module": "demo", "workers": ["http://127.0.0.1:1"]}))
    assert answer.code == 2
    assert "use `qsun route` for running workers" in answer.err


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_interrupts_and_later_ones_do_nothing(first):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with UpSignals() as signals:
        signal.raise_signal(signal.SIGHUP)
        assert signals.hangup.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(first)
        for number in numbers:
            signal.raise_signal(number)
    assert [signal.getsignal(number) for number in numbers] == before
