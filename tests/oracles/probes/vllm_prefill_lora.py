"""vllm_prefill_lora.py OUT JOB: tokens of one vLLM engine whose adapters act on prompt tokens only.

JOB is JSON: model, adapters (name -> directory), waves (lists of {adapter or null, tokens, n}), new_tokens, engine
(more arguments of LLM). Each wave is one call, so that a later one meets the prefix cache that earlier ones left. For
n > 1, which vLLM refuses with temperature 0, each token is sampled from the first choice alone.
OUT holds, in turn: the answers of all requests, new_tokens for each of their n; preemptions; prefix-cache hits, in
tokens.
"""

import json
import sys
from pathlib import Path

import numpy as np
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest


def counter(engine, name):
    return int(sum(metric.value for metric in engine.get_metrics() if metric.name == name))


def main(out, job):
    job = json.loads(Path(job).read_text())
    engine = LLM(
        job["model"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_lora=True,
        disable_log_stats=False,
        **job["engine"],
    )
    adapters = {name: LoRARequest(name, i, path) for i, (name, path) in enumerate(job["adapters"].items(), 1)}
    always = {"max_tokens": job["new_tokens"], "ignore_eos": True, "detokenize": False}
    found = []
    for wave in job["waves"]:
        prompts = [TokensPrompt(prompt_token_ids=request["tokens"]) for request in wave]
        sampling = [
            SamplingParams(n=request["n"], temperature=int(request["n"] > 1), top_k=1, **always) for request in wave
        ]
        chosen = [adapters.get(request["adapter"]) for request in wave]
        for result in engine.generate(prompts, sampling, lora_request=chosen, use_tqdm=False):
            for output in result.outputs:
                found += output.token_ids
    found += [counter(engine, "vllm:num_preemptions"), counter(engine, "vllm:prefix_cache_hits")]
    np.save(out, np.array(found, dtype=np.int64), allow_pickle=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
