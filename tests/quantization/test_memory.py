"""Peak memory does not grow with the number of layers."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from qsun.memory import available_bytes, cgroup_available_bytes

# One allocator arena: what is measured is what the walk keeps, not how threads spread the heap.
QUIET = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1048576"}


@pytest.mark.slow
def test_peak_memory_of_four_times_the_layers(tmp_path):
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 100, (4, 64)))
    (tmp_path / "fast.yaml").write_text("scale_search: false")  # a search takes most of the time, and no memory
    peaks = []
    for layers in (2, 8):
        config = LlamaConfig(
            vocab_size=100,
            hidden_size=768,
            intermediate_size=1536,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=2,
        )
        LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / f"base{layers}", max_shard_size="20MB")
        command = [sys.executable, "-m", "qsun.cli.main", "quantize", str(tmp_path / f"base{layers}"), "--json"]
        command += ["-o", str(tmp_path / f"out{layers}"), "--calib", str(tmp_path / "ids.npy"), "--method", "rtn"]
        command += ["--config", str(tmp_path / "fast.yaml")]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, env=QUIET)
        peaks.append(json.loads(done.stdout)["peak_rss_bytes"])
    block_bytes = 4 * (2 * 768 * 768 + 2 * 192 * 768 + 3 * 768 * 1536)
    assert peaks[1] - peaks[0] < block_bytes  # six more blocks, and not even one more of them in memory


def test_the_peak_is_the_process_s_own():
    parent = np.ones(75 << 20)  # 600 MiB, which a child's getrusage would report as its own
    child = "from qsun.memory import peak_rss_bytes; print(peak_rss_bytes())"
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True, timeout=120)
    assert 10 << 20 < int(done.stdout) < parent.nbytes


def cgroup(folder, limit, current, cached):
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\nactive_file 7\n")
    return folder


def test_a_containers_limit_is_what_counts(tmp_path):
    assert cgroup_available_bytes(cgroup(tmp_path, 1000, 600, 100)) == 1000 - 600 + 107
    assert cgroup_available_bytes(cgroup(tmp_path, 1000, 1200, 0)) == 1
    assert cgroup_available_bytes(cgroup(tmp_path, "max", 600, 100)) is None
    assert cgroup_available_bytes(tmp_path / "none") is None
    (tmp_path / "memory.max").write_text("rubbish")
    assert cgroup_available_bytes(tmp_path) is None


def test_available_memory_is_no_more_than_the_containers(monkeypatch):
    whole = available_bytes()
    monkeypatch.setattr("qsun.memory.cgroup_available_bytes", lambda: 12345)
    assert available_bytes() == 12345 < whole
