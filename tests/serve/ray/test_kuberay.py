"""The RayService that `qsun up --print --kuberay` prints; needs no Ray."""

import json
import re
import shlex
import sys
from types import SimpleNamespace

import pytest
import yaml

from qsun.errors import QsunError
from qsun.serve.cluster.file import parse_cluster
from qsun.serve.cluster.names import ServedNames
from qsun.serve.ray.config import ray_service, serve_config
from qsun.serve.ray.plan import plan_apps

NAMES = ServedNames("qsun-d", {"math": "qsun-m", "code": "qsun-c"})


def cluster(**changes):
    values = {
        "listen": {"host": "0.0.0.0", "api_keys": "/keys/of-clients"},  # noqa: S104
        "decode": {"module": "demo", "workers": 2},
        "models": {"math": {"module": "/m/math", "workers": 1}, "code": {"module": "/m/code", "workers": 3}},
        "launch": {"device": "cpu"},
        "ray": {"transfer_device": "eth0"},
    }
    return parse_cluster(values | changes)


def printed(**changes):
    return ray_service(cluster(**changes), plan_apps(cluster(**changes), NAMES), "2.60.0")["spec"]


def pods(spec):
    groups = [spec["rayClusterConfig"]["headGroupSpec"], *spec["rayClusterConfig"]["workerGroupSpecs"]]
    assert len(groups) == 2
    return [group["template"]["spec"] for group in groups]


def test_it_holds_the_config():
    spec = printed()
    assert yaml.safe_load(spec["serveConfigV2"]) == serve_config(cluster(), plan_apps(cluster(), NAMES))
    assert spec["rayClusterConfig"]["workerGroupSpecs"][0]["maxReplicas"] == 6


def test_a_pool_of_adapters_has_pods_and_its_files_are_mounted():
    models = {"math": {"adapter": "/m/adapters/math"}, "code": {"adapter": "/m/adapters/code"}}
    spec = printed(prefill={"module": "/m/base", "workers": 2}, models=models)
    assert spec["rayClusterConfig"]["workerGroupSpecs"][0]["maxReplicas"] == 4
    assert pods(spec)[0]["containers"][0]["volumeMounts"][0]["mountPath"] == "/m"


def test_pods_mount_the_modules_and_the_secret_with_the_keys():
    for pod in pods(printed()):
        modules, keys = pod["containers"][0]["volumeMounts"]
        assert modules == {"name": "modules", "mountPath": "/m", "readOnly": True}
        assert keys == {"name": "keys", "mountPath": "/keys/of-clients", "subPath": "of-clients", "readOnly": True}
        items = [{"key": "of-clients", "path": "of-clients"}]
        assert pod["volumes"][1] == {"name": "keys", "secret": {"secretName": "qsun-keys", "items": items}}
    for pod in pods(printed(listen={"host": "0.0.0.0", "without_keys": True})):  # noqa: S104
        assert [volume["name"] for volume in pod["volumes"]] == ["modules"]


def test_adapters_of_one_engine_transfer_nothing_and_their_pod_has_room_for_an_ingress_and_its_successor():
    models = {"math": {"adapter": "/m/math"}, "code": {"adapter": "/m/code"}}
    spec = printed(models=models, decode={"module": "demo", "workers": 1}, ray={})
    assert pods(spec)[1]["containers"][0]["resources"]["limits"]["cpu"] == "3"
    assert pods(printed())[1]["containers"][0]["resources"]["limits"]["cpu"] == "2"


@pytest.mark.parametrize(
    ("ray", "launch", "cpu", "gpus"),
    [
        ({}, {"device": "cpu"}, "2", None),
        ({"cpus": 1.5}, {"device": "cpu"}, "3", None),
        ({"cpus": 2.5, "ingress_replicas": 11}, {"device": "cpu"}, "5", None),
        ({}, {"tensor_parallel_size": 2}, "2", "2"),
        ({"gpus": 4}, {"tensor_parallel_size": 2}, "2", "4"),
        ({"gpus": 0.5}, {}, "2", "1"),
        ({"gpus": 0}, {}, "2", "1"),
        ({"gpus": 1}, {"device": "cpu"}, "2", "1"),
    ],
)
def test_a_replica_fits_its_pod(ray, launch, cpu, gpus):
    limits = pods(printed(ray={"transfer_device": "eth0"} | ray, launch=launch))[1]["containers"][0]["resources"][
        "limits"
    ]
    assert (limits["cpu"], limits.get("nvidia.com/gpu")) == (cpu, gpus)


def test_worker_pods_have_the_resources_that_replicas_take():
    """KubeRay pastes the parameter into the command line of `ray start`, which reads JSON."""
    spec = printed(ray={"transfer_device": "eth0", "resources": {"a100": 0.5, "b": 2.0}})
    value = spec["rayClusterConfig"]["workerGroupSpecs"][0]["rayStartParams"]["resources"]
    assert [json.loads(argument) for argument in shlex.split(value)] == [{"a100": 1, "b": 2}]
    assert printed()["rayClusterConfig"]["workerGroupSpecs"][0]["rayStartParams"] == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ray": {}}, "transfer_device lo stays in one pod"),
        ({"listen": {}}, "listen.host 127.0.0.1 is reachable in one pod only"),
        (
            {"decode": {"module": "/other/int4", "workers": 1}},
            "share no directory but /, and pods mount one",
        ),
        ({"listen": {"api_keys": "/m/keys", "host": "0.0.0.0"}}, "api_keys /m/keys is in /m, the modules' volume"),  # noqa: S104
    ],
)
def test_what_pods_cannot_have(changes, message):
    with pytest.raises(QsunError, match=re.escape(message)):
        printed(**changes)


def test_printing_reads_no_keys(tmp_path, monkeypatch, cli):
    """They are where the ingress will run. A Ray that is here may be of any version."""
    file = tmp_path / "cluster.yaml"
    values = {"decode": {"module": "demo", "workers": 1}, "models": {"math": {"module": "demo", "workers": 1}}}
    listen = {"host": "0.0.0.0", "api_keys": "/keys/none-here"}  # noqa: S104
    file.write_text(yaml.safe_dump(values | {"listen": listen, "ray": {"transfer_device": "eth0"}}))
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(__version__="2.60.0"))
    answer = cli("up", file, "--print", "--kuberay", "--json")
    assert "/keys/none-here" in json.dumps(json.loads(answer.out)["spec"]["rayClusterConfig"])
