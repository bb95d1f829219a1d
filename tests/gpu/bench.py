"""The kernel bench of `make gpu`, for a machine that has torch, triton and transformers only.

python tests/gpu/bench.py FOLDER [device]: writes FOLDER/kernels.json and prints a line for each point.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from qsun.eval.output.machine import machine
from qsun.eval.speed.kernel_bench import KernelVariant, Patience, bench_kernels, layers_of

ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256]
MODELS = ["llama-3.1-8b", "qwen3-8b", "llama-3.2-1b", "llama-3.1-70b-tp4", "qwen3-1.7b"]


def main(folder, device="cuda"):
    where = torch.device(device)
    small = where.type == "cpu"  # to see that it runs
    layers, rows = (layers_of([], ["64x128"]), [1]) if small else (layers_of(MODELS, []), ROWS)
    kind = KernelVariant(128, True, torch.bfloat16, where)
    result = bench_kernels(layers, rows, kind, Patience(25, 1.0, 5.0), lambda line: print(line, flush=True))
    result |= machine(where)
    (Path(folder) / "kernels.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["geometric_mean"], indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
