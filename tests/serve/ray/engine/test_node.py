"""A replica starts only with the modules that were planned, whatever its node has under their names."""

import pytest

from qsun.errors import QsunError
from qsun.model.checkpoint import Checkpoint
from qsun.model.lora import adapter_fingerprint
from qsun.serve.cluster.names import served_name
from qsun.serve.ray.engine.node import command_on_node
from tests.adapter_rig import write_adapter


@pytest.fixture
def engine(base_directory, tmp_path):
    """The arguments of a prefill replica with an adapter."""
    adapter = write_adapter(tmp_path / "math", base_directory, 0)
    return {
        "pool": "prefill",
        "role": "prefill",
        "module": str(base_directory),
        "served_name": served_name(Checkpoint(base_directory).fingerprint()),
        "adapters": {"math": {"served_name": served_name(adapter_fingerprint(adapter)), "directory": str(adapter)}},
        "launch": {"device": "cpu"},
        "transfer_device": "lo",
        "max_tokens": 99,
        "deadline_seconds": 77.5,
    }


def test_the_planned_modules(engine):
    command = command_on_node(engine, "abcd", "10.0.0.1")
    assert command.name == "prefill-abcd"
    assert command.served_name == engine["served_name"]
    assert command.adapters == (engine["adapters"]["math"]["served_name"],)
    assert '{"max_new_tokens": 99}' in command.argv
    assert any('"kv_lease_duration": 78' in argument for argument in command.argv)
    assert command.environment["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "127.0.0.1"


def test_a_network_to_other_nodes(engine):
    environment = command_on_node(engine | {"transfer_device": "eth1"}, "abcd", "10.0.0.1").environment
    assert (environment["UCX_NET_DEVICES"], environment["VLLM_NIXL_SIDE_CHANNEL_HOST"]) == ("eth1", "10.0.0.1")
    assert environment["GLOO_SOCKET_IFNAME"] == "lo"


def test_other_weights_on_this_node(engine, base_directory, tmp_path):
    with pytest.raises(QsunError, match=r"on this node is qsun-\w{16} and not qsun-old; give every node"):
        command_on_node(engine | {"served_name": "qsun-old"}, "abcd", "10.0.0.1")
    write_adapter(tmp_path / "other", base_directory, 1)
    engine["adapters"]["math"]["directory"] = str(tmp_path / "other")
    with pytest.raises(QsunError, match=r"other on this node is qsun-\w{16} and not qsun-"):
        command_on_node(engine, "abcd", "10.0.0.1")
    engine["adapters"]["math"]["directory"] = str(tmp_path / "none")
    with pytest.raises(QsunError, match=r"none is not on this node; give every node the same files"):
        command_on_node(engine, "abcd", "10.0.0.1")
