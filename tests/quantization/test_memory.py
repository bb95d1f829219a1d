"""Peak memory does not grow with the number of layers, and is what a dry run says."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qsun
from qsun.data.calibration import Calibration, Sample
from qsun.memory import available_bytes, cgroup_available_bytes
from qsun.quantization import plan
from qsun.quantization.job import prepare
from qsun.quantization.plan import make_plan
from tests.tiny_models import SEQUENCE, random_tokens

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


@pytest.mark.slow
def test_the_dry_run_of_a_large_head_says_what_the_run_takes(tmp_path):
    """Rounding to nearest holds a matrix five times in float32."""
    (tmp_path / "fast.yaml").write_text("scale_search: false")
    sizes = {"hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 8}
    LlamaForCausalLM(LlamaConfig(vocab_size=32768, **sizes)).bfloat16().save_pretrained(tmp_path / "base")
    command = [sys.executable, "-m", "qsun.cli.main", "quantize", str(tmp_path / "base"), "--json", "--lm-head"]
    command += ["-o", str(tmp_path / "out"), "--method", "rtn", "--config", str(tmp_path / "fast.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, env=QUIET)
    report = json.loads(done.stdout)
    assert 0.9 < report["plan"]["peak_ram_bytes"] / report["peak_rss_bytes"] < 1.2


@pytest.mark.slow
def test_the_dry_run_of_polish_says_what_the_run_takes(tmp_path):
    """A step's activations and logits, and two models one after the other, are most of it."""
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 100, (9, 512)))
    (tmp_path / "fast.yaml").write_text("scale_search: false\nsweeps: 0")
    config = LlamaConfig(
        vocab_size=16384,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    command = [sys.executable, "-m", "qsun.cli.main", "quantize", str(tmp_path / "base"), "--json", "--polish", "1"]
    command += ["-o", str(tmp_path / "out"), "--calib", str(tmp_path / "ids.npy"), "--method", "gptq"]
    command += ["--config", str(tmp_path / "fast.yaml"), "--samples", "9", "--seq-len", "512", "--dtype", "float32"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, env=QUIET)
    report = json.loads(done.stdout)
    assert 0.9 < report["plan"]["peak_ram_bytes"] / report["peak_rss_bytes"] < 1.2
    assert report["peak_rss_bytes"] > 1 << 30  # far more than the interpreter's


@pytest.fixture
def planned(tiny_model, tmp_path):
    """Factory: planned(samples, device, **settings) -> the plan of a run over these samples, half of them held out."""

    def make(samples, device="cpu", **settings):
        np.save(tmp_path / "ids.npy", random_tokens(9, SEQUENCE))
        config = qsun.QuantConfig(method="gptq", group_size=32, samples=9, seq_len=SEQUENCE, **settings)
        job = prepare(tiny_model("llama"), tmp_path / "out", config, tmp_path / "ids.npy", "cpu")
        job.skeleton.device = torch.device(device)
        half = len(samples) // 2
        calibration = Calibration(tuple(samples[:half]), "", "", tuple(samples[half:]))
        return make_plan(job.skeleton, config, job.specs, calibration, job.shards)

    return make


def of_rtn(base, out, device="cpu", **settings):
    config = qsun.QuantConfig(method="rtn", group_size=32, **settings)
    job = prepare(base, out, config, device="cpu")
    job.skeleton.device = torch.device(device)
    return make_plan(job.skeleton, config, job.specs, None, job.shards)


def test_rounding_works_on_all_rows_of_a_stage_and_on_the_head(tiny_model, tmp_path):
    """A block's gate and up are one matrix of 256 x 64 here; a head of 1024 x 64 is larger."""
    base = tiny_model("llama", vocab_size=1024)
    plain, head = (of_rtn(base, tmp_path / "out", lm_head=lm_head).peak_ram_bytes for lm_head in (False, True))
    block = (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64) * 4
    embedding = 4 * 1024 * 64
    assert plain == plan._INTERPRETER_BYTES + embedding + 2 * block + 20 * 256 * 64
    assert head == plan._INTERPRETER_BYTES + embedding + 24 * 1024 * 64


def test_embedding_and_head_are_written_at_once(tiny_model, tmp_path):
    peaks = [of_rtn(tiny_model("llama", vocab_size=v), tmp_path / "out", "cuda").peak_ram_bytes for v in (4096, 8192)]
    assert peaks[1] - peaks[0] == 2 * 4096 * 64 * 4


def test_prompts_that_the_base_reads_take_a_second_stream(planned):
    prompts, text = ([Sample((5,) * 24, prompt)] * 16 for prompt in (20, 0))
    more = planned(prompts).peak_ram_bytes - planned(text).peak_ram_bytes
    stream, kv_and_states = 3 * 24 * 64, 20 * (2 * 2 * 16 + 64)
    assert more == 8 * (stream + kv_and_states) * 4


def test_polish_on_a_gpu_keeps_what_the_base_taught_outside_of_it(planned):
    """The KV of prompts, and a hidden state of each decode position; of samples held out too."""
    few, many = ([Sample((5,) * 24, 20)] * count for count in (400, 800))
    less, more = (planned(samples, "cuda", polish=1) for samples in (few, many))
    assert more.peak_ram_bytes - less.peak_ram_bytes == 400 * (20 * 2 * 2 * 2 * 16 + 4 * 64) * 4
    assert planned(many, "cuda").peak_ram_bytes < less.peak_ram_bytes  # passes keep nothing there
    on_cpu = planned(many, polish=1)
    assert on_cpu.peak_vram_bytes == 0
    assert on_cpu.peak_ram_bytes > more.peak_ram_bytes


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
