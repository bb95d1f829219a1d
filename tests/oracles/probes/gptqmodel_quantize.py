"""gptqmodel_quantize.py OUT BASE DIR TOKENS SETTINGS: GPTQModel quantizes BASE into DIR; OUT gets the tokens it used.

SETTINGS is a JSON object of its QuantizeConfig's arguments.
"""

import json
import sys

import numpy as np
from gptqmodel import GPTQModel, QuantizeConfig

if __name__ == "__main__":
    out, base, directory, token_file, settings = sys.argv[1:]
    tokens = np.load(token_file, allow_pickle=False)
    config = QuantizeConfig(device="cpu", offload_to_disk=False, **json.loads(settings))
    model = GPTQModel.load(base, config)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    model.quantize(rows, batch_size=1)
    model.save(directory)
    np.save(out, tokens, allow_pickle=False)
