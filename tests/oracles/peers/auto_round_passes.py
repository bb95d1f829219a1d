"""AutoRound on a base, as a peer for `qsun bench passes`: the same calibration ids, the same divergence.

In an environment with auto-round: python auto_round_passes.py BASE calib.npy valid.npy GRID [ITERS [GROUP]]
GRID is such as 4s or 2a. Prints one JSON line: kl_x1000 and cpu_seconds (of the quantization alone), one thread.
"""

import json
import sys
import time

import numpy as np
import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

WINDOWS, WINDOW, BATCH = 96, 256, 16


def log_probabilities(model, ids):
    with torch.no_grad():
        return torch.cat([model(input_ids=part).logits.float().log_softmax(-1) for part in ids.split(BATCH)])


def main(base, calib, valid, grid, iters=200, group_size=64):
    torch.set_num_threads(1)
    load = lambda: AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()  # noqa: E731
    samples = torch.from_numpy(np.load(calib).astype(np.int64))
    held_out = torch.from_numpy(np.load(valid).astype(np.int64)).flatten()[: WINDOWS * WINDOW].view(WINDOWS, WINDOW)
    reference = log_probabilities(load(), held_out)
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in samples.split(8)]
    rounder = AutoRound(
        load(),
        AutoTokenizer.from_pretrained(base),
        bits=int(grid[0]),
        sym=grid[1] == "s",
        group_size=int(group_size),
        iters=int(iters),
        dataset=batches,
        nsamples=len(samples),
        seqlen=samples.shape[1],
        device_map="cpu",
        amp=False,
        seed=0,
    )
    started = time.process_time()
    model, _ = rounder.quantize()
    seconds = time.process_time() - started
    ours = log_probabilities(model, held_out)
    divergence = float((reference.exp() * (reference - ours)).sum()) / held_out.numel()
    print(json.dumps({"grid": grid, "iters": int(iters), "kl_x1000": 1000 * divergence, "cpu_seconds": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
