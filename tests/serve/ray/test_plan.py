"""What `qsun up` would deploy; needs no Ray."""

import json

import pytest

from qsun.errors import QsunError
from qsun.serve.cluster.file import parse_cluster
from qsun.serve.cluster.names import ServedNames
from qsun.serve.ray.config import serve_config
from qsun.serve.ray.plan import DECODE_APP, needed_resources, plan_apps, pool_app
from qsun.serve.ray.scaling import METRIC, ByOutstandingTokens, OutstandingTokens

NAMES = ServedNames("qsun-d", {"math": "qsun-m", "a/b": "qsun-ab"})
MATH, AB = "qsun-prefill-math-58a6d680", "qsun-prefill-a-b-c14cddc0"


def cluster(**changes):
    values = {
        "decode": {"module": "demo", "workers": 2},
        "models": {"math": {"module": "/m/math", "workers": 1}, "a/b": {"module": "/m/ab", "workers": 3}},
        "launch": {"device": "cpu"},
    }
    return parse_cluster(values | changes)


def planned(**changes):
    return {app.name: app for app in plan_apps(cluster(**changes), NAMES)}


def test_a_pool_is_an_application_and_clients_reach_the_ingress_only():
    apps = planned()
    assert list(apps) == [DECODE_APP, MATH, AB, "qsun"]
    assert [app.route_prefix for app in apps.values()] == [None, None, None, "/"]
    assert [apps[name].replicas["num_replicas"] for name in list(apps)[:3]] == [2, 1, 3]
    assert apps["qsun"].args["pools"] == [DECODE_APP, MATH, AB]


def test_a_module_that_changes_changes_its_own_application_only():
    before = planned()
    after = {app.name: app for app in plan_apps(cluster(), ServedNames("qsun-d", NAMES.prefill | {"math": "qsun-new"}))}
    assert [name for name in before if before[name] != after[name]] == [MATH]


def test_models_that_come_or_move_restart_no_other():
    before = planned()
    models = {"new": {"module": "/m/new", "workers": 1}, "a/b": {"module": "/m/ab", "workers": 3}}
    models["math"] = {"module": "/m/math", "workers": 1}
    names = ServedNames("qsun-d", NAMES.prefill | {"new": "qsun-n"})
    after = {app.name: app for app in plan_apps(cluster(models=models), names)}
    assert [name for name in before if before[name] != after[name]] == ["qsun"]  # it must learn of the new model
    assert pool_app("a/b") != pool_app("a:b") != pool_app("a-b")


def test_a_module_elsewhere_and_more_replicas_leave_the_ingress_alone():
    before = planned(policy="partitioned")["qsun"]
    models = {"math": {"module": "/other/math", "workers": 2}, "a/b": {"module": "/m/ab", "workers": 1}}
    decode = {"module": "/m/int4", "workers": 5, "scale": {"workers": 7, "tokens": 9}}
    launch = {"device": "cpu", "max_model_len": 512}
    after = planned(policy="partitioned", models=models, decode=decode, launch=launch)
    assert after["qsun"] == before


def test_another_number_of_replicas_restarts_none():
    """Serve starts all replicas anew whose arguments have changed."""
    before, after = planned(), planned(decode={"module": "demo", "workers": 5})
    assert after[DECODE_APP].args == before[DECODE_APP].args
    assert after[DECODE_APP].replicas != before[DECODE_APP].replicas


def test_the_ingress_reads_its_part_as_a_cluster_file():
    whole = cluster(policy="partitioned", limits={"queue_seconds": 7.0}, listen={"host": "0.0.0.0", "api_keys": "/k"})  # noqa: S104
    args = {app.name: app for app in plan_apps(whole, NAMES)}["qsun"].args
    part = parse_cluster(json.loads(json.dumps(args["cluster"])))
    for section in ("listen", "policy", "prefill_policy", "limits", "health"):
        assert getattr(part, section) == getattr(whole, section)
    assert list(part.models) == list(whole.models)


def test_an_ingress_starts_before_the_one_that_it_replaces_stops():
    many = planned(ray={"ingress_replicas": 3})["qsun"]
    assert many.replicas == {"num_replicas": 3}
    assert -(-3 * many.args["deployment"]["max_surge_percent"] // 100) == 1  # as Serve rounds
    apps = plan_apps(cluster(ray={"ingress_replicas": 3, "cpus": 0.0}), NAMES)
    assert (needed_resources(apps)["CPU"], needed_resources(apps, updating=True)["CPU"]) == (3, 4)


def test_a_ray_of_this_machine_has_all_that_replicas_take():
    decode = {"module": "demo", "workers": 1, "scale": {"workers": 3, "tokens": 500}}
    apps = plan_apps(cluster(decode=decode, ray={"resources": {"a100": 0.5, "fast": 2.0}}), NAMES)
    assert needed_resources(apps) == {"CPU": 3 + 1 + 3 + 1, "a100": 3.5, "fast": 2 * (3 + 1 + 3)}
    gpus = plan_apps(cluster(launch={"tensor_parallel_size": 2}, ray={"cpus": 0.5, "surge_percent": 50}), NAMES)
    assert needed_resources(gpus) == {"CPU": 6 / 2 + 1, "GPU": 12}
    assert needed_resources(gpus, updating=True) == {"CPU": 9.5 / 2 + 0.25 + 2, "GPU": 2 * (3 + 2 + 5)}


def test_arguments_are_json():
    for app in planned(ray={"resources": {"a100": 1.0}}).values():
        assert json.loads(json.dumps(app.args)) == app.args


def test_tensor_parallel_ranks_share_a_node():
    """A replica's GPUs are one actor's, and Ray gives an actor those of one node."""
    options = planned(launch={"tensor_parallel_size": 4})[DECODE_APP].args["deployment"]["ray_actor_options"]
    assert options == {"num_cpus": 1.0, "num_gpus": 4, "resources": {}}
    shared = planned(launch={}, ray={"gpus": 0.5})[DECODE_APP].args["deployment"]["ray_actor_options"]
    assert shared["num_gpus"] == 0.5


def test_autoscaling():
    decode = {"module": "demo", "workers": 1, "scale": {"workers": 3, "tokens": 500, "up_seconds": 2.0}}
    options = planned(decode=decode)[DECODE_APP].replicas
    assert "num_replicas" not in options
    assert options["autoscaling_config"]["min_replicas"] == 1
    assert options["autoscaling_config"]["max_replicas"] == 3
    assert options["autoscaling_config"]["policy"]["policy_kwargs"] == {"tokens": 500}


ADAPTERS = {"x": {"adapter": "/m/x"}, "y": {"adapter": "/m/y"}}
ADAPTER_NAMES = ServedNames("qsun-d", {"x": "qsun-x", "y": "qsun-y", "math": "qsun-m"}, "qsun-base")


def test_adapters_have_a_pool_in_common():
    models = ADAPTERS | {"math": {"module": "/m/math", "workers": 1}}
    whole = cluster(prefill={"module": "/m/base", "workers": 2}, models=models)
    decode, shared, math, ingress = plan_apps(whole, ADAPTER_NAMES)
    assert [decode.name, shared.name, math.name] == [DECODE_APP, "qsun-prefill", MATH]
    engine = shared.args["engine"]
    assert (engine["role"], engine["module"], engine["served_name"]) == ("prefill", "/m/base", "qsun-base")
    assert engine["adapters"]["y"] == {"served_name": "qsun-y", "directory": "/m/y"}
    assert decode.args["engine"]["adapters"] == math.args["engine"]["adapters"] == {}
    assert ingress.args["pools"] == [DECODE_APP, "qsun-prefill", MATH]
    assert list(parse_cluster(ingress.args["cluster"]).models) == ["x", "y", "math"]
    tuned = ServedNames("qsun-d", ADAPTER_NAMES.prefill | {"x": "qsun-x2"}, "qsun-base")
    after = plan_apps(whole, tuned)
    assert [a.name for a, b in zip(after, [decode, shared, math, ingress], strict=True) if a != b] == ["qsun-prefill"]


def test_adapters_without_a_pool_are_served_by_one_engine():
    names = ServedNames("qsun-d", ADAPTER_NAMES.prefill, "qsun-d")
    decode, ingress = plan_apps(cluster(models=ADAPTERS), names)
    assert decode.args["engine"]["role"] == "aggregated"
    assert list(decode.args["engine"]["adapters"]) == ["x", "y"]
    assert ingress.args["pools"] == [DECODE_APP]
    limited = plan_apps(cluster(models=ADAPTERS, limits={"max_tokens": 77}), names)
    assert limited[0].args["engine"]["max_tokens"] == 77
    assert planned(limits={"max_tokens": 77})[DECODE_APP] == planned()[DECODE_APP]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"models": ADAPTERS, "launch": {"kernels": "vllm"}},
            "models.x is an adapter without prefill workers, and launch.kernels vllm is without our plugin",
        ),
        (
            {"models": ADAPTERS, "launch": {"prefill_arguments": ["--seed", "1"]}},
            "launch.prefill_arguments is for prefill workers, and there are none; use launch.decode_arguments",
        ),
        (
            {"decode": {"module": "demo", "workers": ["http://a:1"]}},
            "decode.workers lists running workers, .* use `qsun route` for running workers",
        ),
        (
            {"decode": {"module": "demo", "workers": 3, "scale": {"workers": 2, "tokens": 1}}},
            "decode.scale.workers 2 is less than decode.workers 3",
        ),
    ],
)
def test_what_cannot_be_placed(changes, message):
    with pytest.raises(QsunError, match=message):
        plan_apps(cluster(**changes), NAMES)


def test_serves_own_schema_takes_the_config():
    schema = pytest.importorskip("ray.serve.schema", reason="needs Ray: pip install 'qsun[ray]'")
    decode = {"module": "demo", "workers": 1, "scale": {"workers": 3, "tokens": 500}}
    config = serve_config(cluster(decode=decode), plan_apps(cluster(decode=decode), NAMES))
    checked = schema.ServeDeploySchema.model_validate(config)
    assert [app.name for app in checked.applications] == [app["name"] for app in config["applications"]]
    assert checked.http_options.host == "127.0.0.1"
    assert set(config) <= set(schema.ServeDeploySchema.model_fields)  # it ignores keys that it does not know
    for app in config["applications"]:
        assert set(app) <= set(schema.ServeApplicationSchema.model_fields)
        options = schema.DeploymentSchema.model_validate({"name": "x", **app["args"]["deployment"]})
        assert set(app["args"]["deployment"]) <= set(type(options).model_fields)
        (replicas,) = app["deployments"]
        assert set(replicas) <= set(type(schema.DeploymentSchema.model_validate(replicas)).model_fields)


class Context:
    def __init__(self, tokens):
        self.aggregated_metrics = {METRIC: dict(enumerate(tokens))}


@pytest.mark.parametrize(("tokens", "wanted"), [([], 0), ([0, 0], 0), ([1], 1), ([500, 500], 2), ([900, 101], 3)])
def test_replicas_by_outstanding_tokens(tokens, wanted):
    assert ByOutstandingTokens(tokens=500)(Context(tokens)) == (wanted, {})


def test_tokens_are_outstanding_until_they_have_come():
    load = OutstandingTokens(prompts_only=False)
    body = json.dumps({"prompt": [1, 2, 3], "max_tokens": 10}).encode()
    with load.counted("/v1/completions", body) as request:
        assert load.tokens == 13
        request.arrived(b"data: {}\n\ndata: {}\n\n")
        assert load.tokens == 11
    assert load.tokens == 0


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_events_are_counted_however_the_stream_is_cut(size):
    stream = b': keep-alive\n\ndata: {"text": "data: data: "}\n\ndata: {}\r\n\r\ndata: [DONE]\n\n'
    load = OutstandingTokens(prompts_only=True, longest=0)
    with load.counted("/v1/completions", json.dumps({"prompt": [1] * 10}).encode()) as request:
        for start in range(0, len(stream), size):
            request.arrived(stream[start : start + size])
        assert load.tokens == 10 - 2


def test_a_request_that_leaves_its_length_open_may_take_all():
    load = OutstandingTokens(prompts_only=False, longest=50)
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 36}]}).encode()
    with load.counted("/v1/chat/completions", body):
        assert load.tokens == 10 + 50


def test_a_prefill_replica_counts_prompts_only():
    load = OutstandingTokens(prompts_only=True)
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 36}], "max_tokens": 1}).encode()
    with load.counted("/v1/chat/completions", body):
        assert load.tokens == 10
    with load.counted("/health", b""):
        assert load.tokens == 0


def test_replicas_have_the_limits_of_the_file():
    """The lease on KV blocks is the deadline: a shorter one lets a late decode worker read another request's."""
    values = {"decode": {"module": "demo", "workers": 1}, "models": {"math": {"module": "demo", "workers": 1}}}
    cluster = parse_cluster(values | {"limits": {"deadline_seconds": 77.0, "gather_seconds": 0.5}})
    *pools, _ = plan_apps(cluster, ServedNames("d", {"math": "m"}))
    found = [(app.args["engine"]["deadline_seconds"], app.args["engine"]["gather_seconds"]) for app in pools]
    assert found == [(77.0, 0.5)] * 2
