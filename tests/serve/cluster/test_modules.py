"""The dtype in which the workers of a cluster compute: KV cache is transferred as raw bytes, so there must be one."""

import json
import logging
import shutil

import pytest

from qsun.serve.cluster.file import parse_cluster
from qsun.serve.cluster.modules import ModuleChecks, with_one_dtype


@pytest.fixture
def cluster(talking_model, tmp_path):
    """cluster(prefill dtype, decode dtype, workers): of a model whose config.json names these dtypes."""

    def written(prefill, decode, workers=1, **more):
        for name, dtype in (("prefill", prefill), ("decode", decode)):
            shutil.copytree(talking_model, tmp_path / name, dirs_exist_ok=True)
            file = tmp_path / name / "config.json"
            kept = {key: value for key, value in json.loads(file.read_text()).items() if "dtype" not in key}
            file.write_text(json.dumps(kept | (dtype if isinstance(dtype, dict) else {"dtype": dtype})))
        urls = ([f"http://w:{port}"] if workers == "urls" else workers for port in (1, 2))
        pools = [{"module": str(tmp_path / name), "workers": next(urls)} for name in ("decode", "prefill")]
        return parse_cluster({"decode": pools[0], "models": {"math": pools[1]}} | more)

    return written


@pytest.mark.parametrize(
    ("prefill", "decode", "dtype"),
    [
        ("bfloat16", "float16", "float16"),
        ("float16", "bfloat16", "bfloat16"),
        ("float16", "float32", "bfloat16"),  # vLLM's auto never computes in float32
        ("float32", "float16", "float16"),
        ({"torch_dtype": "float16"}, {}, "bfloat16"),  # in which its weights are stored
        ({"text_config": {"dtype": "float16"}}, "bfloat16", "bfloat16"),
        ("float32", "bfloat16", "auto"),
        ("float32", "float32", "auto"),
        ({}, "bfloat16", "auto"),
        ({"dtype": "float16", "model_type": "gemma2"}, {"dtype": "bfloat16", "model_type": "gemma2"}, "auto"),
    ],
    ids=str,
)
def test_workers_of_qsun_up_compute_in_one_dtype(cluster, prefill, decode, dtype):
    assert with_one_dtype(cluster(prefill, decode)).launch.dtype == dtype


def test_a_dtype_of_the_file_stays(cluster):
    assert with_one_dtype(cluster("float16", "bfloat16", launch={"dtype": "float32"})).launch.dtype == "float32"


@pytest.mark.parametrize("workers", ["urls", 1])
def test_qsun_route_warns_where_running_workers_may_compute_in_two(cluster, caplog, workers):
    checks = ModuleChecks()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):  # as a reload does
            checks.names(cluster("bfloat16", "float16", workers))
    warning = "by default vLLM computes models.math in bfloat16 and decode in float16, and KV cache of another dtype"
    assert [record.message.startswith(warning) for record in caplog.records] == [True] * (workers == "urls")
    assert all("--dtype float16" in record.message for record in caplog.records)
    caplog.clear()
    checks.names(cluster("bfloat16", "bfloat16", workers))
    assert not caplog.records
