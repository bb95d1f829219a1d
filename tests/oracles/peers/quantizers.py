"""Quantize with another tool, on given calibration ids; run in that tool's environment, by compare.py.

    python quantizers.py TOOL BASE calib.npy OUT GRID GROUP_SIZE

TOOL is gptqmodel, llm-compressor or auto-round; GRID is such as 4s or 2a. Each tool has its own defaults but for the
calibration, the grid and, of AutoRound, its 200 steps. OUT becomes a directory that `qsun.load_decode` reads.
"""

import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def gptqmodel(base, samples, out, bits, sym, group_size):
    from gptqmodel import GPTQModel, QuantizeConfig

    model = GPTQModel.load(base, QuantizeConfig(bits=bits, sym=sym, group_size=group_size), device="cpu")
    model.quantize([{"input_ids": s, "attention_mask": torch.ones_like(s)} for s in samples], batch_size=8)
    model.save(out)


def llm_compressor(base, samples, out, bits, sym, group_size):
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    weights = {"num_bits": bits, "symmetric": sym, "group_size": group_size, "strategy": "group", "type": "int"}
    recipe = GPTQModifier(ignore=["lm_head"], config_groups={"all": {"targets": ["Linear"], "weights": weights}})
    ids = samples.tolist()
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(base)
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=data,
        recipe=recipe,
        max_seq_length=samples.shape[1],
        num_calibration_samples=len(samples),
    )
    model.save_pretrained(out, save_compressed=True)


def auto_round(base, samples, out, bits, sym, group_size):
    from auto_round import AutoRound

    loaded = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    rounder = AutoRound(
        loaded,
        AutoTokenizer.from_pretrained(base),
        bits=bits,
        sym=sym,
        group_size=group_size,
        iters=200,
        dataset=[{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in samples.split(8)],
        nsamples=len(samples),
        seqlen=samples.shape[1],
        device_map="cpu",
        amp=loaded.dtype == torch.bfloat16,  # it would compute, and save, a float32 model in bfloat16
    )
    model, _ = rounder.quantize()  # the weights are dequantized ones
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)


TOOLS = {"gptqmodel": gptqmodel, "llm-compressor": llm_compressor, "auto-round": auto_round}


def main(tool, base, calibration, out, grid, group_size):
    torch.set_num_threads(1)
    samples = torch.from_numpy(np.load(calibration).astype(np.int64))
    TOOLS[tool](base, samples, out, int(grid[:-1]), grid.endswith("s"), int(group_size))


if __name__ == "__main__":
    main(*sys.argv[1:])
