"""vllm_plugin_tokens.py OUT DIR PROMPTS TOKENS [RANKS]: greedy tokens of a vLLM engine on our kernels, float32.

OUT holds (prompts, TOKENS) int64. With one rank the engine runs in this process, and its layers are looked at: those
that the module stores as integers must be QuantLinear.
"""

import sys

import numpy as np
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt


def quantized_layers(model):
    return sum(type(module).__name__ == "QuantLinear" for module in model.modules())


def main(out, directory, prompts, count, ranks="1"):
    engine = LLM(
        directory,
        dtype="float32",
        quantization="qsun",
        tensor_parallel_size=int(ranks),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=4,
        kv_cache_memory_bytes=64 << 20,
    )
    if int(ranks) == 1:
        assert sum(engine.apply_model(quantized_layers)) > 0
    sampling = SamplingParams(temperature=0, max_tokens=int(count), ignore_eos=True, detokenize=False)
    inputs = [TokensPrompt(prompt_token_ids=row.tolist()) for row in np.load(prompts, allow_pickle=False)]
    answers = [list(result.outputs[0].token_ids) for result in engine.generate(inputs, sampling, use_tqdm=False)]
    np.save(out, np.array(answers, dtype=np.int64), allow_pickle=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
