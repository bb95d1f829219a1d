"""Commands of workers: the flags that keep models apart are set, no shell is involved, ports and GPUs are assigned."""

import importlib
import json
import shlex

import pytest

from qsun.demo import base_directory
from qsun.errors import QsunError
from qsun.model.checkpoint import read_json
from qsun.serve.cluster.file import parse_cluster
from qsun.serve.cluster.names import ServedNames
from qsun.serve.launch.launcher import fill_in
from qsun.serve.launch.plan import free_ports, plan_workers, started_urls

NAMES = ServedNames("qsun-decode", {"math": "qsun-math", "a/b": "qsun-ab"})


def cluster(decode="demo", **launch):
    return parse_cluster(
        {
            "decode": {"module": decode, "workers": 2},
            "models": {"math": {"module": "demo", "workers": 1}, "a/b": {"module": "demo", "workers": 1}},
            "launch": {"first_port": 9000, **launch},
        }
    )


def value(command, flag):
    return command.argv[command.argv.index(flag) + 1]


@pytest.fixture
def quantized(tmp_path):
    """A directory whose config.json says that it is quantized."""
    config = read_json(base_directory() / "config.json") | {"quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_roles():
    decode, _, math, other = plan_workers(cluster(device="cpu"), NAMES)
    assert [decode.name, math.name, other.name] == ["decode-0", "prefill-0-math", "prefill-1-a_b"]
    assert (value(decode, "--served-model-name"), value(math, "--served-model-name")) == ("qsun-decode", "qsun-math")
    transfer = json.loads(value(decode, "--kv-transfer-config"))
    assert transfer["kv_role"] == "kv_consumer"
    assert transfer["kv_load_failure_policy"] == "fail"
    assert transfer["kv_buffer_device"] == "cpu"
    assert transfer["kv_connector_extra_config"]["enforce_handshake_compat"] is False
    assert json.loads(value(math, "--kv-transfer-config"))["kv_role"] == "kv_producer"
    assert "--no-enable-prefix-caching" in decode.argv
    assert "--enforce-eager" in decode.argv
    assert transfer["kv_connector_extra_config"]["num_threads"] == 0
    assert decode.environment["OMP_NUM_THREADS"] == "1"
    assert all(command.argv[command.argv.index("--host") + 1] == "127.0.0.1" for command in (decode, math))


def test_decode_workers_run_our_kernels_and_refuse_requests_without_kv_cache_unless_the_file_says_otherwise(quantized):
    ours, theirs = (plan_workers(cluster(str(quantized), kernels=kernels), NAMES) for kernels in ("qsun", "vllm"))
    assert value(ours[0], "--quantization") == "qsun"
    assert all("--quantization" not in command.argv for command in (*theirs, *ours[2:]))
    module, _, name = value(ours[0], "--middleware").rpartition(".")
    assert hasattr(importlib.import_module(module), name)
    assert all("--middleware" not in command.argv for command in (*theirs, *ours[2:]))


def test_ports_and_gpus_go_one_after_another():
    commands = plan_workers(cluster(tensor_parallel_size=2), NAMES)
    assert [command.url.rpartition(":")[2] for command in commands] == ["9000", "9002", "9004", "9006"]
    assert [command.environment["VLLM_NIXL_SIDE_CHANNEL_PORT"] for command in commands] == [
        "9001",
        "9003",
        "9005",
        "9007",
    ]
    assert [command.environment["CUDA_VISIBLE_DEVICES"] for command in commands] == ["0,1", "2,3", "4,5", "6,7"]
    shared = plan_workers(cluster(gpus=[3]), NAMES)
    assert [command.environment["CUDA_VISIBLE_DEVICES"] for command in shared] == ["3"] * 4


@pytest.mark.parametrize(
    ("visible", "size", "expected"),
    [
        (None, 1, ["0", "1", "2", "3"]),
        ("4,5, 6,7", 1, ["4", "5", "6", "7"]),
        ("7,6,5,4,3,2,1,0", 2, ["7,6", "5,4", "3,2", "1,0"]),
        ("MIG-a,MIG-b,MIG-c,MIG-d,MIG-e", 1, ["MIG-a", "MIG-b", "MIG-c", "MIG-d"]),
    ],
)
def test_gpus_are_those_that_the_launcher_sees(visible, size, expected):
    commands = plan_workers(cluster(tensor_parallel_size=size), NAMES, visible)
    assert [command.environment["CUDA_VISIBLE_DEVICES"] for command in commands] == expected


@pytest.mark.parametrize(("visible", "has"), [("4,5,6", 3), ("", 0), ("4,-1,5,6", 1)])
def test_too_few_gpus_are_visible(visible, has):
    one_line = rf"^the workers need 4 GPUs, and CUDA_VISIBLE_DEVICES={visible} has {has}; start fewer, .*share them$"
    with pytest.raises(QsunError, match=one_line):
        plan_workers(cluster(), NAMES, visible)
    listed = plan_workers(cluster(gpus=[4, 5]), NAMES, visible)
    assert [command.environment["CUDA_VISIBLE_DEVICES"] for command in listed] == ["4", "5", "4", "5"]
    own = plan_workers(cluster(environment={"CUDA_VISIBLE_DEVICES": "9"}), NAMES, visible)
    assert {command.environment["CUDA_VISIBLE_DEVICES"] for command in own} == {"9"}
    assert "CUDA_VISIBLE_DEVICES" not in plan_workers(cluster(device="cpu"), NAMES, visible)[0].environment


NETWORKS = ("UCX_NET_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def test_what_hands_data_over_keeps_to_the_loopback_device():
    for command in plan_workers(cluster(), NAMES):
        assert [command.environment[name] for name in NETWORKS] == ["lo"] * 3
    chosen = plan_workers(cluster(environment={"UCX_NET_DEVICES": "mlx5_0:1"}), NAMES)[0].environment
    assert (chosen["UCX_NET_DEVICES"], chosen["GLOO_SOCKET_IFNAME"]) == ("mlx5_0:1", "lo")


@pytest.mark.parametrize("name", ["A B", "A;touch x;B", "1A", "A=B", "", "A\n"])
def test_a_name_that_no_variable_has_is_refused(name):
    """--print shows names as they are, before an equals sign: quotes would make another command of them."""
    with pytest.raises(QsunError, match=r"(?s)^cluster: launch.environment\..* is invalid: use letters, digits and _"):
        cluster(environment={name: "x"})


def test_options_and_environment_of_the_file_come_last():
    launch = {"decode_arguments": ["--seed", "1; rm -rf /"], "environment": {"HF_HUB_OFFLINE": "0"}, "max_num_seqs": 4}
    decode, _, math, _ = plan_workers(cluster(**launch), NAMES)
    assert decode.argv[-2:] == ("--seed", "1; rm -rf /")
    assert "--seed" not in math.argv
    assert value(math, "--max-num-seqs") == "4"
    assert decode.environment["HF_HUB_OFFLINE"] == "0"
    assert "1; rm -rf /" in shlex.split(decode.shell())


def write_adapter_config(directory, rank):
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps({"r": rank}))
    return str(directory)


@pytest.fixture
def shared(tmp_path):
    """shared(**launch): two prefill workers for two adapters, beside a full module."""
    models = {
        "math": {"adapter": write_adapter_config(tmp_path / "math", 4)},
        "tool": {"adapter": write_adapter_config(tmp_path / "tool", 24)},
        "a/b": {"module": "demo", "workers": 1},
    }
    pools = {"decode": {"module": "demo", "workers": 1}, "prefill": {"module": "demo", "workers": 2}, "models": models}

    def make(**launch):
        return parse_cluster(pools | {"launch": {"first_port": 9000, "device": "cpu", **launch}})

    return make


SHARED_NAMES = ServedNames("qsun-decode", NAMES.prefill | {"tool": "qsun-tool"}, "qsun-base")


def test_prefill_workers_of_adapters_have_all_of_them_and_decode_workers_none(shared, tmp_path):
    decode, first, second, full = plan_workers(shared(), SHARED_NAMES)
    assert [first.name, second.name, full.name] == ["prefill-0-adapters", "prefill-1-adapters", "prefill-2-a_b"]
    for worker in (first, second):
        assert value(worker, "--served-model-name") == "qsun-base"
        assert json.loads(value(worker, "--kv-transfer-config"))["kv_role"] == "kv_producer"
        assert value(worker, "--max-lora-rank") == "32"
        assert (value(worker, "--max-loras"), value(worker, "--max-cpu-loras")) == ("2", "2")
        at = worker.argv.index("--lora-modules")
        assert worker.argv[at + 1 : at + 3] == (f"qsun-math={tmp_path / 'math'}", f"qsun-tool={tmp_path / 'tool'}")
        assert worker.environment["QSUN_PREFILL_LORA"] == "1"
        assert (worker.model, worker.adapters) == (None, ("qsun-math", "qsun-tool"))
    for worker in (decode, full):
        assert "--enable-lora" not in worker.argv
        assert "QSUN_PREFILL_LORA" not in worker.environment
    theirs = plan_workers(shared(kernels="vllm", max_loras=1), SHARED_NAMES)[1]
    assert "QSUN_PREFILL_LORA" not in theirs.environment  # their environment has no plugin that reads it
    assert value(theirs, "--max-loras") == "1"


def test_workers_of_adapters_take_the_place_of_their_number(shared, tmp_path):
    first = shared()
    commands = plan_workers(first, SHARED_NAMES)
    filled = fill_in(first, first, commands)
    assert filled.prefill.urls == ("http://127.0.0.1:9002", "http://127.0.0.1:9004")
    assert filled.models["a/b"].urls == ("http://127.0.0.1:9006",)
    assert filled.models["math"].adapter == str(tmp_path / "math")
    filled.need_running_workers()
    other = first.models["math"].model_copy(update={"adapter": "elsewhere"})
    changed = first.model_copy(update={"models": {**first.models, "math": other}})
    with pytest.raises(QsunError, match=r"^models.math: qsun up gives adapters to workers only at its own start"):
        fill_in(changed, first, commands)


def test_a_rank_that_vllm_does_not_serve(shared, tmp_path):
    (tmp_path / "math" / "adapter_config.json").write_text('{"r": 513}')
    with pytest.raises(QsunError, match=r"^an adapter has rank 513, and vLLM serves at most 512"):
        plan_workers(shared(), SHARED_NAMES)


def test_free_ports_are_distinct():
    assert len(set(free_ports(32))) == 32


def test_too_few_ports_are_left():
    with pytest.raises(QsunError, match=r"^launch.first_port 65530 leaves too few ports for 4 workers"):
        plan_workers(cluster(first_port=65530), NAMES)


def test_urls_of_started_workers_take_the_place_of_numbers():
    first = cluster()
    commands = plan_workers(first, NAMES)
    decode, shared, models = started_urls(commands)
    assert shared == []
    filled = fill_in(first, first, commands)
    assert list(filled.decode.urls) == decode
    assert list(filled.models["a/b"].urls) == models["a/b"]


def test_a_file_that_asks_for_more_workers_later_is_refused():
    first = cluster()
    commands = plan_workers(first, NAMES)
    more = first.model_copy(update={"decode": first.decode.model_copy(update={"workers": 3})})
    with pytest.raises(QsunError, match=r"^decode: qsun up starts workers only at its own start"):
        fill_in(more, first, commands)


def test_only_ray_scales():
    values = cluster().to_dict()
    values["decode"]["scale"] = {"workers": 3, "tokens": 100}
    with pytest.raises(QsunError, match=r"decode.scale needs Ray; add --ray or drop it"):
        plan_workers(parse_cluster(values), NAMES)
