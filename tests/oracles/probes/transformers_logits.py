"""transformers_logits.py OUT DTYPE TOKENS DIR...: logits of directories as transformers loads them, stacked."""

import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM


@torch.no_grad()
def logits(directory, tokens, dtype):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, device_map="cpu").eval()
    return model(input_ids=tokens).logits.float().numpy()


if __name__ == "__main__":
    out, dtype_name, token_file, *directories = sys.argv[1:]
    ids = torch.from_numpy(np.load(token_file, allow_pickle=False))
    dtype = getattr(torch, dtype_name)
    np.save(out, np.stack([logits(directory, ids, dtype) for directory in directories]), allow_pickle=False)
