"""Commands of vLLM servers: the flags that keep models apart are set, and everything keeps to the loopback device."""

import importlib
import json
from pathlib import Path

import pytest

from qsun.demo import base_directory
from qsun.errors import QsunError
from qsun.model.checkpoint import read_json
from qsun.serve.cluster.schema import LaunchSettings, RequestLimits
from qsun.serve.ray.engine.command import EngineModule, engine_command, free_ports

NETWORKS = ("UCX_NET_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def command(role="decode", directory="demo", adapters=None, **launch):
    module = EngineModule(str(directory), f"qsun-{role}", adapters or {})
    return engine_command(f"{role}-abc", role, module, LaunchSettings(**launch), (9000, 9001))


def value(command, flag):
    return command.argv[command.argv.index(flag) + 1]


@pytest.fixture
def quantized(tmp_path):
    """A directory whose config.json says that it is quantized."""
    config = read_json(base_directory() / "config.json") | {"quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_roles():
    decode, prefill = command("decode", device="cpu"), command("prefill", device="cpu")
    assert (value(decode, "--served-model-name"), value(prefill, "--served-model-name")) == (
        "qsun-decode",
        "qsun-prefill",
    )
    transfer = json.loads(value(decode, "--kv-transfer-config"))
    assert transfer["kv_role"] == "kv_consumer"
    assert transfer["kv_load_failure_policy"] == "fail"
    assert transfer["kv_buffer_device"] == "cpu"
    assert transfer["kv_connector_extra_config"]["enforce_handshake_compat"] is False
    assert transfer["kv_connector_extra_config"]["num_threads"] == 0
    assert json.loads(value(prefill, "--kv-transfer-config"))["kv_role"] == "kv_producer"
    for role in (decode, prefill):
        leased = json.loads(value(role, "--kv-transfer-config"))["kv_connector_extra_config"]["kv_lease_duration"]
        assert leased == RequestLimits().deadline_seconds
    assert "--no-enable-prefix-caching" in decode.argv
    assert "--no-enable-prefix-caching" not in prefill.argv
    assert "--enforce-eager" in decode.argv
    assert "--enforce-eager" not in command(device="cuda").argv
    assert decode.environment["OMP_NUM_THREADS"] == "1"
    assert all(value(one, "--host") == "127.0.0.1" for one in (decode, prefill))


def test_its_ports():
    one = command()
    assert (value(one, "--port"), one.environment["VLLM_NIXL_SIDE_CHANNEL_PORT"]) == ("9000", "9001")
    assert one.url == "http://127.0.0.1:9000"


def test_free_ports_are_distinct():
    assert len(set(free_ports(32))) == 32


def test_decode_servers_run_our_kernels_and_refuse_requests_without_kv_cache_unless_the_file_says_otherwise(quantized):
    ours, theirs = (command(directory=quantized, kernels=kernels) for kernels in ("qsun", "vllm"))
    prefill = command("prefill", quantized)
    assert value(ours, "--quantization") == "qsun"
    assert "--quantization" not in theirs.argv
    assert "--quantization" not in command().argv
    module, _, name = value(ours, "--middleware").rpartition(".")
    assert hasattr(importlib.import_module(module), name)
    assert all("--middleware" not in one.argv for one in (theirs, prefill))


def test_gpus_are_rays_to_make_visible():
    assert "CUDA_VISIBLE_DEVICES" not in command(tensor_parallel_size=2).environment
    assert value(command(tensor_parallel_size=2), "--tensor-parallel-size") == "2"


def test_what_hands_data_over_keeps_to_the_loopback_device():
    assert [command().environment[name] for name in NETWORKS] == ["lo"] * 3
    chosen = command(environment={"UCX_NET_DEVICES": "mlx5_0:1"}).environment
    assert (chosen["UCX_NET_DEVICES"], chosen["GLOO_SOCKET_IFNAME"]) == ("mlx5_0:1", "lo")


def test_options_and_environment_of_the_file_come_last():
    launch = {"decode_arguments": ["--seed", "1; rm -rf /"], "environment": {"HF_HUB_OFFLINE": "0"}, "max_num_seqs": 4}
    decode, prefill = command("decode", **launch), command("prefill", **launch)
    assert decode.argv[-2:] == ("--seed", "1; rm -rf /")
    assert "--seed" not in prefill.argv
    assert value(prefill, "--max-num-seqs") == "4"
    assert decode.environment["HF_HUB_OFFLINE"] == "0"


@pytest.fixture
def adapters(tmp_path):
    """Directories of two adapters by served name."""
    found = {}
    for name, rank, targets in (("math", 4, ["q_proj", "v_proj"]), ("tool", 24, ["model.layers.0.mlp.up_proj"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"r": rank, "target_modules": targets}))
        found[f"qsun-{name}"] = str(tmp_path / name)
    return found


def test_servers_of_adapters_have_all_of_them(adapters):
    one = command("prefill", adapters=adapters)
    assert json.loads(value(one, "--kv-transfer-config"))["kv_role"] == "kv_producer"
    assert value(one, "--max-lora-rank") == "32"
    assert (value(one, "--max-loras"), value(one, "--max-cpu-loras")) == ("2", "2")
    at = one.argv.index("--lora-modules")
    assert one.argv[at + 1 : at + 3] == tuple(f"{name}={directory}" for name, directory in adapters.items())
    at = one.argv.index("--lora-target-modules")  # none but theirs are held for each adapter, not even the head
    assert one.argv[at + 1 : at + 5] == ("q_proj", "up_proj", "v_proj", "--lora-modules")
    assert one.environment["QSUN_PREFILL_LORA"] == "1"
    assert one.adapters == ("qsun-math", "qsun-tool")
    theirs = command("prefill", adapters=adapters, kernels="vllm", max_loras=1)
    assert "QSUN_PREFILL_LORA" not in theirs.environment  # their environment has no plugin that reads it
    assert value(theirs, "--max-loras") == "1"
    for without in (command("decode"), command("prefill")):
        assert "--enable-lora" not in without.argv
        assert "QSUN_PREFILL_LORA" not in without.environment


def test_an_adapter_that_names_its_layers_by_a_pattern_may_have_any(adapters):
    config = {"r": 4, "target_modules": "all-linear"}
    (Path(adapters["qsun-math"]) / "adapter_config.json").write_text(json.dumps(config))
    assert "--lora-target-modules" not in command("prefill", adapters=adapters).argv


def test_one_engine_transfers_nothing_and_keeps_adapters_to_prompts(adapters, quantized):
    one = command("aggregated", quantized, adapters, decode_arguments=["--seed", "1"])
    assert not {"--kv-transfer-config", "--no-enable-prefix-caching"} & set(one.argv)
    module, _, name = value(one, "--middleware").rpartition(".")
    assert hasattr(importlib.import_module(module), name)
    assert value(one, "--quantization") == "qsun"
    assert "--enable-lora" in one.argv
    assert one.environment["QSUN_PREFILL_LORA"] == "1"
    assert one.argv[-2:] == ("--seed", "1")


def test_workers_that_decode_draft(adapters, quantized):
    drafts = {"method": "ngram", "num_speculative_tokens": 6, "prompt_lookup_min": 2, "prompt_lookup_max": 4}
    for one in (command("decode", speculate=6), command("aggregated", quantized, adapters, speculate=6)):
        assert json.loads(value(one, "--speculative-config")) == drafts
    for one in (command("prefill", speculate=6), command("decode")):
        assert "--speculative-config" not in one.argv
    own = ["--speculative-config", '{"method": "suffix"}']
    assert command("decode", speculate=6, decode_arguments=own).argv[-2:] == tuple(own)  # vLLM takes the last


def test_answers_have_a_longest_length_if_one_is_given():
    one = engine_command("a", "decode", EngineModule("demo", "d"), LaunchSettings(), (1, 2), 99)
    assert json.loads(value(one, "--override-generation-config")) == {"max_new_tokens": 99}
    assert "--override-generation-config" not in command().argv


def test_a_rank_that_vllm_does_not_serve(adapters, tmp_path):
    (tmp_path / "math" / "adapter_config.json").write_text('{"r": 513}')
    with pytest.raises(QsunError, match=r"^an adapter has rank 513, and vLLM serves at most 512"):
        command("prefill", adapters=adapters)
