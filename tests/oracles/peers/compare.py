"""Compare quantization tools on one base: divergence on held-out text, CPU seconds and peak memory of a whole run.

    python tests/oracles/peers/compare.py BASE calib.npy valid.npy OUT.json --tool auto-round=PYTHON_OF_ITS_ENVIRONMENT

Every tool gets the same calibration ids (samples, tokens) and one thread, quantizes in a process of its own, from
reading the base to saving, and writes a directory; qsun loads it and compares it with the base, in float32, on the
windows of valid.npy. OUT.json holds finished rows, which are not run again.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from qsun.eval.harness.divergence import read_windows, text_divergence
from qsun.eval.output.table import Table
from qsun.runtime.decode_module import load_decode

QUANTIZERS = Path(__file__).parent / "quantizers.py"
# A small process of its own: a child's peak begins with the memory of the process that forks it.
MEASURE = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=sys.stderr)
_, status, used = os.wait4(process.pid, 0)
print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss]))
sys.exit(status != 0)
"""
COLUMNS = {
    "tool": "{tool}",
    "grid": "{grid}",
    "KL x 1000": "{kl_x1000:.3g}",
    "same top token, %": "{top1:.1f}",
    "CPU s": "{cpu_seconds:.0f}",
    "peak MiB": "{peak_mib:.0f}",
}


def command(tool: str, python: str, base: str, calibration: Path, out: str, grid: str, group_size: int) -> list[str]:
    """Return the command that quantizes; of qsun a tool is named refined, gptq or refined+STEPS of polish."""
    if python:
        return [python, str(QUANTIZERS), tool, base, str(calibration), out, grid, str(group_size)]
    method, _, polish = tool.partition("+")
    grid_options = ["--bits", grid[:-1], "--group-size", str(group_size), "--sym" if grid.endswith("s") else "--asym"]
    qsun = [sys.executable, "-m", "qsun.cli.main", "quantize", base, "-o", out, "--calib", str(calibration)]
    return [*qsun, *grid_options, "--method", method, "--polish", polish or "0"]


def run(arguments: list[str], log: Path) -> dict[str, float]:
    """Run a command with one thread, in its log's folder; return CPU seconds and peak memory, children included."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GPTQMODEL_CPU_WORKERS": "2"}
    with log.open("w") as printed:
        measuring = [sys.executable, "-c", MEASURE, *arguments]
        done = subprocess.run(
            measuring, check=False, env=environment, cwd=log.parent, stdout=subprocess.PIPE, stderr=printed
        )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{log.read_text()[-2000:]}")
    seconds, kib = json.loads(done.stdout)
    return {"cpu_seconds": seconds, "peak_mib": kib / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("valid", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tool", action="append", default=[], help="NAME=PYTHON; qsun's own need no PYTHON")
    parser.add_argument("--grids", default="4s,3s,2a")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--windows", type=int, nargs=2, default=(96, 256), metavar=("COUNT", "TOKENS"))
    given = parser.parse_args()
    base = str(Path(given.base).resolve()) if Path(given.base).is_dir() else given.base
    calibration = given.calibration.resolve()
    rows = json.loads(given.out.read_text()) if given.out.exists() else []
    windows = read_windows(given.valid, base, *given.windows)
    reference = load_decode(base, device="cpu", dtype="float32").model
    for grid in given.grids.split(","):
        for named in given.tool or ["gptq", "refined"]:
            tool, _, python = named.partition("=")
            if any((row["tool"], row["grid"]) == (tool, grid) for row in rows):
                continue
            with tempfile.TemporaryDirectory(dir=given.out.resolve().parent) as scratch:
                made = f"{scratch}/module"
                words = command(tool, python, base, calibration, made, grid, given.group_size)
                row = {"tool": tool, "grid": grid} | run(words, Path(scratch) / "log")
                found = text_divergence(load_decode(made, device="cpu", dtype="float32").model, reference, windows)
            if not found.mean_kl:
                raise SystemExit(f"{tool} {grid}: saved the base's own weights; were they quantized?")
            rows.append(row | {"kl_x1000": 1000 * found.mean_kl, "top1": 100 * found.top1})
            given.out.write_text(json.dumps(rows, indent=1))
            print(Table.of(rows[-1:], COLUMNS).text(), flush=True)
    print(Table.of(rows, COLUMNS).markdown())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
