"""cluster.yaml: what it may contain, and the one-line error for what it may not."""

import copy
import json
import re
import shutil

import pytest

import qsun
from qsun.errors import QsunError
from qsun.model.checkpoint import Checkpoint
from qsun.serve.cluster.file import need_running_workers, parse_cluster, read_cluster
from qsun.serve.cluster.modules import ModuleChecks
from qsun.serve.cluster.names import served_name
from qsun.serve.http.keys import read_keys
from tests.adapter_rig import write_adapter
from tests.tiny_models import build_model

EVERYWHERE = "0.0.0.0"  # noqa: S104 - it is what must be refused

GOOD = {
    "decode": {"module": "int4", "workers": ["http://127.0.0.1:8201", "http://127.0.0.1:8202/"]},
    "models": {"math": {"module": "math", "workers": ["HTTP://127.0.0.1:8101"]}, "code": {"module": "c", "workers": 2}},
}


def test_defaults_are_safe_and_urls_are_normal():
    cluster = parse_cluster(GOOD)
    assert (cluster.listen.host, cluster.policy) == ("127.0.0.1", "least_outstanding_tokens")
    assert cluster.decode.urls == ("http://127.0.0.1:8201", "http://127.0.0.1:8202")
    assert cluster.models["math"].urls == ("http://127.0.0.1:8101",)


def test_a_number_of_workers_is_for_qsun_up():
    cluster = parse_cluster(GOOD)
    with pytest.raises(QsunError, match=r"models.code.workers is the number 2; list the URLs .* `qsun up`"):
        need_running_workers(cluster)


@pytest.mark.parametrize("name", ["A B", "A;touch x;B", "1A", "A=B", "", "A\n"])
def test_a_name_that_no_variable_has_is_refused(name):
    with pytest.raises(QsunError, match=r"(?s)launch.environment\..* is invalid: use letters, digits and _"):
        parse_cluster(GOOD | {"launch": {"environment": {name: "x"}}})


@pytest.mark.parametrize("tokens", [-1, 33, 1.5])
def test_drafted_tokens_have_bounds(tokens):
    with pytest.raises(QsunError, match=r"launch.speculate"):
        parse_cluster(GOOD | {"launch": {"speculate": tokens}})
    assert parse_cluster(GOOD | {"launch": {"speculate": 6}}).launch.speculate == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"polcy": 1}, "unknown setting 'polcy'; did you mean policy? known are: decode, health,"),
        ({"policy": "x"}, "policy 'x' is not supported; use least_outstanding_tokens, power_of_two"),
        ({"limits": {"deadline": 1}}, "unknown setting 'limits.deadline'; did you mean deadline_seconds?"),
        ({"limits": {"attempts": 0}}, "limits.attempts 0 is out of range; use 1 or more"),
        ({"limits": {"max_tokens": True}}, "limits.max_tokens True is not a whole number"),
        ({"health": {"interval_seconds": float("nan")}}, "health.interval_seconds nan is not a finite number"),
        (
            {"listen": {"host": EVERYWHERE}},
            "host 0.0.0.0 can be reached from other machines, and no API key is set; set listen.api_keys",
        ),
        ({"models": {}}, "models {} is invalid"),
        ({"models": {"a b": {"module": "x", "workers": 1}}}, "model name 'a b' is invalid"),
        ({"decode": {"module": "x"}}, "decode.workers is missing; add it"),
        ({"decode": {"module": "x", "workers": []}}, "decode.workers [] is invalid: use a list of URLs"),
        ({"decode": {"module": "x", "workers": ["file:///etc"]}}, "use http://host:port or https://host:port"),
        ({"decode": {"module": "x", "workers": ["http://h:8000/v1"]}}, "without path, query or user"),
        ({"decode": {"module": "x", "workers": ["http://u:p@h"]}}, "without path, query or user"),
        ({"decode": {"module": "x", "workers": ["http://127.0.0.1:8101"]}}, "is in decode and in models.math"),
        (
            {"decode": {"module": "x", "workers": [{"url": "http://h", "models": ["math"]}]}},
            "under `partitioned` only",
        ),
        ({"policy": "partitioned", "decode": {"module": "x", "workers": 1}}, "there are 1 for 2; add workers"),
    ],
)
def test_errors_are_one_line_with_value_and_fix(change, message):
    with pytest.raises(QsunError, match=re.escape(message)) as caught:
        parse_cluster(copy.deepcopy(GOOD) | change, "cluster.yaml")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("cluster.yaml: ")


def test_partitioned_by_the_file_covers_every_model():
    workers = [{"url": "http://h:1", "models": ["math"]}, {"url": "http://h:2"}]
    values = copy.deepcopy(GOOD) | {"policy": "partitioned", "decode": {"module": "x", "workers": workers}}
    with pytest.raises(QsunError, match="some decode workers have `models` and some have none"):
        parse_cluster(values)
    workers[1]["models"] = ["math"]
    with pytest.raises(QsunError, match="no decode worker is for model 'code'"):
        parse_cluster(values)
    workers[1]["models"] = ["code", "math"]
    assert parse_cluster(values).decode.workers[1].models == ("code", "math")


def test_a_key_that_is_there_twice_is_no_model_lost(tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "decode: {module: a, workers: 1}\nmodels:\n  m: {module: b, workers: 1}\n  m: {module: c, workers: 1}\n"
    )
    with pytest.raises(QsunError, match="key 'm' occurs twice"):
        read_cluster(file)


@pytest.mark.parametrize("text", ["", "[]", "a: [", "!!python/object/apply:os.system [true]", "\xff"])
def test_files_that_are_no_cluster(tmp_path, text):
    file = tmp_path / "cluster.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(QsunError, match=r"cluster\.yaml"):
        read_cluster(file)


def test_keys_come_from_a_file_beside_the_cluster(tmp_path):
    (tmp_path / "keys").write_text("# ours\n\nfirst-key\nsecond-key\n")
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "listen: {host: 0.0.0.0, api_keys: keys}\ndecode: {module: demo, workers: 1}\n"
        "models: {m: {module: sub, workers: 1}}\n"
    )
    cluster = read_cluster(file)
    assert read_keys(cluster.listen.api_keys) == ("first-key", "second-key")
    assert cluster.decode.module == "demo"
    assert cluster.models["m"].module == str(tmp_path / "sub")
    (tmp_path / "keys").write_text("# none\n")
    with pytest.raises(QsunError, match="has no API key"):
        read_keys(cluster.listen.api_keys)


def test_pairs_are_checked_and_names_are_fingerprints(talking_model, tmp_path, monkeypatch):
    other = build_model(tmp_path / "other", "llama", vocab_size=64)
    for pattern in ("tokenizer*", "chat_template*"):
        for file in talking_model.glob(pattern):
            shutil.copyfile(file, other / file.name)
    pool = {"module": str(talking_model), "workers": ["http://h:1"]}
    values = {"decode": pool, "models": {"m": {"module": str(talking_model), "workers": ["http://h:2"]}}}
    checks = ModuleChecks()
    names = checks.names(parse_cluster(values))
    assert re.fullmatch("qsun-[0-9a-f]{16}", names.decode)
    assert names.decode == names.prefill["m"] == served_name(checks.fingerprint(talking_model.resolve()))
    monkeypatch.setattr(
        "qsun.model.checkpoint.Checkpoint.fingerprint", None
    )  # a reload must not read the weights again
    assert checks.names(parse_cluster(values)) == names
    monkeypatch.undo()
    values["models"]["m"]["module"] = str(other)
    with pytest.raises(QsunError, match="does not fit decode module"):
        checks.names(parse_cluster(values))
    values["models"]["m"]["module"] = str(tmp_path / "none")
    with pytest.raises(QsunError, match=r"models.m.module .*none is not a directory; give one relative to"):
        checks.names(parse_cluster(values))


SHARED = {
    "decode": {"module": "int4", "workers": 1},
    "prefill": {"module": "base", "workers": ["http://127.0.0.1:8111"]},
    "models": {"math": {"adapter": "out/math"}, "code": {"module": "c", "workers": ["http://127.0.0.1:8101"]}},
}


def test_adapters_have_the_workers_of_prefill():
    cluster = parse_cluster(SHARED)
    assert list(cluster.adapters) == ["math"]
    assert list(cluster.pools) == ["decode", "prefill", "models.code"]
    assert parse_cluster(cluster.to_dict()) == cluster


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"prefill": None},
            "models.math is an adapter without prefill workers, and models.code is a full module; give",
        ),
        (
            {"prefill": None, "models": {"math": {"adapter": "a"}}, "policy": "partitioned"},
            "models.math is an adapter without prefill workers, and policy partitioned is about decode workers alone",
        ),
        ({"models": {"code": SHARED["models"]["code"]}}, "prefill has workers for adapters, but there are none"),
        ({"models": {"math": {"adapter": "a", "workers": 1}}}, "adapter and workers exclude each other"),
        ({"models": {"math": {"adapter": "a", "module": "m"}}}, "adapter and module exclude each other"),
        ({"models": {"math": {"adapter": ""}}}, "module is missing; give module and workers, or adapter"),
        ({"models": {"math": {"adaptor": "a"}}}, "module is missing"),
        ({"prefill": {"module": "base", "workers": ["http://127.0.0.1:8101"]}}, "is in prefill and in models.code"),
    ],
)
def test_what_an_adapter_cannot_be(change, message):
    with pytest.raises(QsunError, match=re.escape(message)):
        parse_cluster(SHARED | change)


def test_adapters_are_served_under_names_of_their_own(base_directory, tmp_path):
    for name, seed in (("math", 0), ("code", 1)):
        write_adapter(tmp_path / name, base_directory, seed)
    shutil.copytree(base_directory, tmp_path / "base")
    file = tmp_path / "cluster.yaml"
    text = "decode: {module: base, workers: 1}\nprefill: {module: base, workers: 1}\nmodels:\n"
    file.write_text(text + "  math: {adapter: math}\n  code: {adapter: code}\n")
    names = ModuleChecks().names(read_cluster(file))
    assert len({*names.prefill.values(), names.shared}) == 3
    assert names.shared == names.decode == served_name(Checkpoint(base_directory).fingerprint())
    settings = tmp_path / "math" / "adapter_config.json"
    values = json.loads(settings.read_text())
    settings.write_text(json.dumps(values | {"lora_alpha": values["lora_alpha"] + 1}))
    assert ModuleChecks().names(read_cluster(file)).prefill["math"] != names.prefill["math"]
    settings.write_text(json.dumps(values | {"peft_type": "IA3"}))
    with pytest.raises(QsunError, match="peft_type 'IA3' is not plain LoRA"):
        ModuleChecks().names(read_cluster(file))
    settings.write_text(json.dumps(values))
    file.write_text(text + "  math: {adapter: base}\n")
    with pytest.raises(QsunError, match=r"base has no adapter_config.json; give a full module as `module`"):
        ModuleChecks().names(read_cluster(file))
    file.write_text(text + "  math: {adapter: math}\n  code: {module: code, workers: 1}\n")
    with pytest.raises(QsunError, match=r"code is a LoRA adapter, .* give it as `adapter`"):
        ModuleChecks().names(read_cluster(file))
    file.write_text(text + "  math: {adapter: nowhere}\n")
    with pytest.raises(QsunError, match=r"models.math.adapter .*nowhere is not a directory"):
        ModuleChecks().names(read_cluster(file))


def test_one_engine_for_adapters_is_for_qsun_up():
    cluster = parse_cluster({"decode": SHARED["decode"], "models": {"math": {"adapter": "out/math"}}})
    assert cluster.one_engine
    assert not parse_cluster(SHARED).one_engine
    with pytest.raises(
        QsunError, match=r"^models.math is an adapter without prefill workers, which only `qsun up` ser"
    ):
        need_running_workers(cluster)


def test_adapters_of_other_weights_than_the_pools_are_refused(base_directory, tmp_path):
    decode = tmp_path / "int4"
    qsun.quantize(base_directory, decode, qsun.QuantConfig(method="rtn", group_size=32), device="cpu")
    write_adapter(tmp_path / "on-base", base_directory, 0)
    write_adapter(tmp_path / "on-int4", base_directory, 0, decode=decode)

    def names(weights, adapter):
        values = {"decode": {"module": str(decode), "workers": 1}, "prefill": {"module": str(weights), "workers": 1}}
        return ModuleChecks().names(parse_cluster(values | {"models": {"math": {"adapter": str(tmp_path / adapter)}}}))

    assert names(base_directory, "on-base").shared != names(decode, "on-int4").shared
    for weights, adapter in ((decode, "on-base"), (base_directory, "on-int4")):
        with pytest.raises(QsunError, match=r"was tuned on the weights qsun-\w{16}, and prefill.module is qsun-"):
            names(weights, adapter)
