"""auto_gptq_logits.py OUT TOKENS DIR...: float32 logits of GPTQ directories as auto-gptq loads them, stacked."""

import sys

import numpy as np
import torch
from auto_gptq import AutoGPTQForCausalLM


@torch.no_grad()
def logits(directory, tokens):
    model = AutoGPTQForCausalLM.from_quantized(
        directory,
        device="cpu",
        disable_exllama=True,
        disable_exllamav2=True,
        use_triton=False,
        torch_dtype=torch.float32,
        use_safetensors=True,
    )
    return model(input_ids=tokens).logits.float().numpy()


if __name__ == "__main__":
    out, token_file, *directories = sys.argv[1:]
    ids = torch.from_numpy(np.load(token_file, allow_pickle=False))
    np.save(out, np.stack([logits(directory, ids) for directory in directories]), allow_pickle=False)
