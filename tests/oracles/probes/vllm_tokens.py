"""vllm_tokens.py OUT DIR PROMPTS TOKENS: greedy continuation of each prompt by a vLLM engine on a CPU, bfloat16.

OUT holds (prompts, 2, TOKENS) float64: the token ids, and the log-probability of each.

vLLM's int4 matrix product for CPUs is compiled for AVX-512 only. Where the processor has none, `stand_in` computes that
one product; reading, checking, fusing and repacking of the weights are vLLM's own either way.
"""

import sys

import numpy as np
import torch
from vllm import LLM, SamplingParams
from vllm import _custom_ops as vllm_ops
from vllm.inputs import TokensPrompt


def stand_in(input, q_weight, scales, zeros, bias, pack_factor, isa_hint):
    """The product that vLLM asks of cpu_gemm_wna16, from its own repacked tensors.

    Args:
        input: (M, K). scales: (G, N). bias: (N,) or None.
        q_weight: (N / 16, 2 K) int32: for 16 output channels and each k, two words of eight nibbles.
        zeros: (G, N / 8) int32, nibbles along N; None means 8.
    """
    K, (G, N) = input.shape[-1], scales.shape
    q = _nibbles(q_weight.reshape(N // 16, K, 2)).permute(1, 0, 2).reshape(K, N)
    zero = 8 if zeros is None else _nibbles(zeros).reshape(G, 1, N)
    weight = ((q.reshape(G, K // G, N) - zero) * scales.float().unsqueeze(1)).reshape(K, N)
    return torch.nn.functional.linear(input, weight.t().to(input.dtype), None if bias is None else bias.to(input.dtype))


def _nibbles(words):
    return ((words.unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15).flatten(-2)


def main(out, directory, prompts, count):
    engine = LLM(
        directory,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=4,
        kv_cache_memory_bytes=64 << 20,
    )
    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        vllm_ops.cpu_gemm_wna16 = stand_in
    sampling = SamplingParams(temperature=0, max_tokens=int(count), ignore_eos=True, logprobs=1, detokenize=False)
    inputs = [TokensPrompt(prompt_token_ids=row.tolist()) for row in np.load(prompts, allow_pickle=False)]
    answers = []
    for result in engine.generate(inputs, sampling, use_tqdm=False):
        ids = list(result.outputs[0].token_ids)
        chances = [step[i].logprob for step, i in zip(result.outputs[0].logprobs, ids, strict=True)]
        answers.append([ids, chances])
    np.save(out, np.array(answers, dtype=np.float64), allow_pickle=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
