"""vllm_lora_speed.py MODEL ADAPTERS [QUANTIZATION]: CPU seconds of decode steps of one vLLM, 16 rows.

ADAPTERS is a folder of at least 16 adapters. Four sides take turns in one process, which has an engine without LoRA and
one with 16 adapters: base (the engine without); no adapter (rows without one, in the engine with LoRA); prefill only
(16 adapters, with QSUN_PREFILL_LORA's functions); ordinary (16 adapters with vLLM's own functions). Prints a JSON line.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
os.environ.pop("QSUN_PREFILL_LORA", None)  # its functions are put in and taken out here

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform

from qsun.vllm import prefill_lora

ROWS, PROMPT, STEPS, ROUNDS = 16, 33, 24, 2


def engine(model, quantization, **options):
    return LLM(
        model,
        dtype="bfloat16",
        quantization=quantization,
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        async_scheduling=False,
        max_model_len=256,
        max_num_seqs=ROWS,
        kv_cache_memory_bytes=256 << 20,
        **options,
    )


def targets_of(adapter):
    return json.loads((adapter / "adapter_config.json").read_text())["target_modules"]


def functions():
    """What is in place of each function that prefill_lora replaces."""
    places = [(prefill_lora._find(module, owner), name) for module, owner, name, *_ in prefill_lora._REPLACEMENTS]
    return [(target, name, getattr(target, name)) for target, name in places]


def put(found):
    for target, name, function in found:
        setattr(target, name, function)


def decode_steps(llm, loras):
    """CPU seconds of each step in which all rows decode, and their tokens."""
    sampling = SamplingParams(temperature=0, max_tokens=STEPS + 1, ignore_eos=True, detokenize=False)
    random = np.random.default_rng(0)
    for row in range(ROWS):
        prompt = TokensPrompt(prompt_token_ids=random.integers(3, 1000, PROMPT).tolist())
        llm.llm_engine.add_request(str(row), prompt, sampling, lora_request=loras[row])
    seconds, answers = [], {}
    while llm.llm_engine.has_unfinished_requests():
        started = time.process_time()
        outputs = llm.llm_engine.step()
        if len(outputs) == ROWS and all(len(output.outputs[0].token_ids) > 1 for output in outputs):
            seconds.append(time.process_time() - started)
        answers |= {output.request_id: tuple(output.outputs[0].token_ids) for output in outputs}
    assert len(seconds) == STEPS
    return seconds, answers


def main(model, folder, quantization=None):
    theirs = functions()
    plain = engine(model, quantization)
    # vLLM 0.32 fails where a second engine of a process does this again
    type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)
    prefill_lora.install()  # the engine's buffers have room for its runs
    ours = functions()
    paths = sorted(path for path in Path(folder).iterdir() if (path / "adapter_config.json").exists())[:ROWS]
    targets = sorted({layer for path in paths for layer in targets_of(path)})  # as `qsun up` does
    lora = {"max_loras": ROWS, "max_cpu_loras": ROWS, "max_lora_rank": 16, "lora_target_modules": targets}
    adapted = engine(model, quantization, enable_lora=True, **lora)
    loras = [LoRARequest(path.name, number, str(path)) for number, path in enumerate(paths, 1)]
    sides = {
        "base": (plain, theirs, [None] * ROWS),
        "no adapter": (adapted, ours, [None] * ROWS),
        "prefill only": (adapted, ours, loras),
        "ordinary": (adapted, theirs, loras),
    }
    taken, answers = {name: [] for name in sides}, {}
    for turn in range(ROUNDS + 1):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            llm, installed, rows = sides[name]
            put(installed)
            seconds, answers[name] = decode_steps(llm, rows)
            taken[name] += seconds if turn else []  # the first turn loads adapters and warms up
    step = {name: statistics.median(seconds) for name, seconds in taken.items()}
    assert answers["base"] == answers["no adapter"] != answers["prefill only"] != answers["ordinary"]
    result = {
        "step_cpu_seconds": step,
        "cpu_ms_a_token": {name: 1000 * seconds / ROWS for name, seconds in step.items()},
        "over_base": {name: seconds / step["base"] for name, seconds in step.items()},
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
