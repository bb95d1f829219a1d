"""The Kubernetes example: valid objects, and vLLM options that are those of `qsun up`."""

import json
import shlex

import pytest
import yaml

from qsun.serve.cluster.file import parse_cluster
from qsun.serve.cluster.schema import LaunchSettings
from qsun.serve.ray.engine.command import EngineModule, engine_command, kv_transfer_config
from tests.places import ROOT

EXAMPLE = ROOT / "docs" / "kubernetes"
OBJECTS = [one for file in sorted(EXAMPLE.glob("*.yaml")) for one in yaml.safe_load_all(file.read_text())]
NAMES = [f"{one['kind']} {one['metadata']['name']}" for one in OBJECTS]
SETS = {one["metadata"]["name"]: one["spec"] for one in OBJECTS if one["kind"] == "StatefulSet"}


@pytest.mark.parametrize("one", OBJECTS, ids=NAMES)
def test_objects_are_valid(one):
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    kubernetes_validate.validate(one, "1.30", strict=True)


def cluster():
    (config,) = (one for one in OBJECTS if one["kind"] == "ConfigMap")
    return parse_cluster(yaml.safe_load(config["data"]["cluster.yaml"]))


def test_the_router_knows_each_pod():
    pods = [
        f"http://{name}-{i}.{spec['serviceName']}:8000" for name, spec in SETS.items() for i in range(spec["replicas"])
    ]
    known = [*cluster().decode.urls, *(url for pool in cluster().models.values() for url in pool.urls)]
    assert sorted(known) == sorted(pods)


@pytest.mark.parametrize("name", list(SETS))
def test_workers_have_the_options_of_qsun_up(name):
    """All but those that are about one machine, or about our plugin, which a stock image lacks."""
    role = "decode" if name == "decode" else "prefill"
    command = engine_command("x", role, EngineModule("demo", "d"), LaunchSettings(kernels="vllm"), (1, 2))
    (container,) = SETS[name]["template"]["spec"]["containers"]
    given = dict(argument.partition("=")[::2] for argument in container["args"])
    wanted = shlex.join(command.argv)
    assert json.loads(given["--kv-transfer-config"]) == kv_transfer_config(role, "cuda")
    assert ("--no-enable-prefix-caching" in given) == ("--no-enable-prefix-caching" in wanted)
    assert set(given) <= set(command.argv)
    assert {one["name"] for one in container["env"]} >= {"VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_NIXL_SIDE_CHANNEL_PORT"}


def test_all_workers_compute_in_one_dtype():
    """KV cache is transferred as raw bytes, and vLLM's default would be the one of each module."""
    arguments = [spec["template"]["spec"]["containers"][0]["args"] for spec in SETS.values()]
    assert {"--dtype=bfloat16" in given for given in arguments} == {True}


def test_probes_leave_the_router_time_to_read_modules_and_keep_it_while_a_model_is_served():
    (deployment,) = (one for one in OBJECTS if one["kind"] == "Deployment")
    (router,) = deployment["spec"]["template"]["spec"]["containers"]
    start = router["startupProbe"]
    assert start["httpGet"] == router["livenessProbe"]["httpGet"]
    assert start["periodSeconds"] * start["failureThreshold"] >= 1800  # it listens once it has read every module
    assert router["readinessProbe"]["httpGet"]["path"] == "/ready/any"


def test_modules_are_where_the_router_says():
    found = {name: spec["template"]["spec"]["containers"][0]["args"][0] for name, spec in SETS.items()}
    models = {f"prefill-{model}": pool.module for model, pool in cluster().models.items()}
    assert found == {
        name: f"--model={module}" for name, module in ({"decode": cluster().decode.module} | models).items()
    }
