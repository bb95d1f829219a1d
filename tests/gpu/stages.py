"""The stages of bench.py: `python tests/gpu/stages.py STAGE FOLDER --device cuda --seconds 100`."""

import argparse
import os
import statistics
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from tests.gpu.bench import ROOT, append

ROWS = [1, 8, 64, 32, 4, 16, 2, 128, 256]  # the first ones first: time may end
KERNEL_MODELS = ["llama-3.1-8b", "llama-3.1-70b-tp4", "llama-3.2-1b", "qwen3-8b"]
STEP_POINTS = [(1, 1024), (8, 1024), (32, 1024), (64, 1024), (1, 128), (64, 128)]  # batch, context
BITS = (4, 2)  # of decode modules and products
TEST_FILES = [f"tests/gpu/test_{name}.py" for name in ("decode", "step", "products", "generation", "lora")]
MOST_PARTS = 14  # of the tests, side by side: compiling kernels takes most of their time
KV_BYTES = {"cuda": 8 << 30, "cpu": 1 << 24}  # of the engine that serves
LOADS = {"cuda": [(64, 256, 64), (256, 512, 128)], "cpu": [(3, 8, 4)]}  # requests, prompt tokens, new tokens
TINY = "tiny"


class Clock:
    """How much of a stage's time is left, for a piece of work that takes as long as the longest so far."""

    def __init__(self, seconds):
        self._end, self._longest, self._begun = time.monotonic() + seconds, 0.0, None

    def has_time(self):
        """Return whether the next piece is expected to fit; called before each."""
        now = time.monotonic()
        if self._begun is not None:
            self._longest = max(self._longest, now - self._begun)
        self._begun = now
        return now + self._longest < self._end

    @property
    def left(self):
        return self._end - time.monotonic()


def shape_of(device, wanted):
    """Return a shape's name: the wanted one on a GPU, a tiny one elsewhere, to see that the stage runs."""
    from qsun.eval.speed import kernel_bench
    from qsun.eval.speed.model_shapes import MODEL_SHAPES, ModelShape

    if device.type == "cuda":
        return wanted
    kernel_bench._BEYOND_CACHES_BYTES[device.type] = 1 << 18
    MODEL_SHAPES.setdefault(TINY, ModelShape(256, 2, 4, 2, 64, 512, 1024))
    return TINY


def tests(folder, device, clock):
    """Tests of the GPU, each part in a process of its own; outcomes.py writes them as they come."""
    parts = max(1, min(MOST_PARTS, (os.cpu_count() or 1) - 2))
    running = []
    for part in range(parts):
        with (folder / f"tests-{part}.log").open("w") as log:
            running.append(subprocess.Popen(tests_command(folder, f"{part}/{parts}"), cwd=ROOT, stdout=log, stderr=log))
    statuses = [process.wait() for process in running]
    sys.exit(next((status for status in statuses if status), 0))


def tests_command(folder, part, files=tuple(TEST_FILES)):
    options = ["-v", "--noconftest", "--maxfail=20", "-m", "gpu", "-p", "no:cacheprovider"]
    outcomes = ["-p", "tests.gpu.outcomes", "--outcomes", str(folder), "--part", part]
    return [sys.executable, "-m", "pytest", *options, *outcomes, *map(str, files)]


def kernels(folder, device, clock):
    """Ours and bf16 at every layer shape and M, then the peers, which may search for a minute; a point at a time."""
    from qsun.eval.output.machine import describe_machine
    from qsun.eval.speed.kernel_bench import OURS, KernelVariant, Patience, bench_kernels, layers_of

    append(folder, "machine", describe_machine(device))
    models = KERNEL_MODELS if device.type == "cuda" else [shape_of(device, "")]
    parts = [(ROWS[:3], False), (ROWS[3:], False), (ROWS[:3], True)] if device.type == "cuda" else [([1], False)]
    for (rows, peers), model in product(parts, models):
        for bits, layer in product(BITS, layers_of([model], [])):
            if not clock.has_time():
                return print(f"{model} {layer[1]} M={rows}, {bits} bits and all after it: no time", flush=True)
            kind, patience = KernelVariant(128, True, torch.bfloat16, device, bits), Patience(15, 0.5)
            result = bench_kernels([layer], rows, kind, patience, lambda line: print(line, flush=True), peers)
            for row in result["rows"]:
                known = row["kernel"] in OURS if peers else row["kernel"] == "bf16" and bits != BITS[0]
                if not known:
                    append(folder, "kernels", {"bits": bits, **row})
    return None


def step(folder, device, clock):
    """A decode step of SUN and of QSUN in 4 and 2 bits, a point at a time."""
    from qsun.eval.output.machine import describe_machine
    from qsun.eval.speed.contenders import made_contenders
    from qsun.eval.speed.decode_speed import Points, bench_speed

    append(folder, "machine", describe_machine(device))
    contenders = made_contenders(shape_of(device, "llama-3.1-8b"), "both", device, bits=BITS)
    points = STEP_POINTS if device.type == "cuda" else [(2, 16)]
    for batch, context in points:
        if not clock.has_time():
            return print(f"batch {batch}, context {context} and all after it: no time", flush=True)
        point = Points((batch,), (context,), steps=24, seconds=5.0)
        result = bench_speed(contenders, point, lambda line: print(line, flush=True))
        for row in result["rows"]:
            append(folder, "step", {"model": contenders.name, **row})
    return None


def serve(folder, device, clock):
    """The engine under load: QSUN's decode module behind SUN's prefill module, requests all at once."""
    from qsun.engine.config import EngineConfig, Sampling
    from qsun.engine.engine import Engine
    from qsun.engine.requests import Request
    from qsun.engine.warming import warm
    from qsun.eval.speed.contenders import QSUN, made_contenders
    from qsun.runtime.decode_module import DecodeModule
    from qsun.runtime.prefill_module import PrefillModule

    contenders = made_contenders(shape_of(device, "llama-3.2-1b"), "bf16", device)
    decode = DecodeModule(contenders.decode[QSUN], Path())
    limits = EngineConfig(max_batch=64, kv_bytes=KV_BYTES[device.type], prefix_bytes=0)
    engine = Engine(decode, limits)
    engine.add_module("m", PrefillModule(contenders.prefill, Path()))
    begun = time.monotonic()
    graphs = warm(engine)
    append(folder, "serve", {"graphs": graphs, "warm_seconds": time.monotonic() - begun})
    for count, prompt, new in LOADS[device.type]:
        if not clock.has_time():
            return print(f"{count} requests: no time", flush=True)
        settings = Sampling(max_new_tokens=new, ignore_eos=True, detokenize=False)
        drawn = torch.randint(decode.model.config.vocab_size, (count, prompt)).tolist()
        requests = [Request(str(number), "m", tuple(tokens), settings) for number, tokens in enumerate(drawn)]
        first, tokens, begun = {}, 0, time.monotonic()
        engine.submit(*requests)
        while not engine.idle and clock.left > 0:
            for update in engine.step():
                tokens += len(update.tokens)
                first.setdefault(update.request, time.monotonic() - begun)
        taken = time.monotonic() - begun
        result = {"requests": count, "prompt_tokens": prompt, "new_tokens": new, "done": engine.idle}
        result |= {"tokens_per_s": tokens / taken, "ttft_p50_s": statistics.median(first.values())}
        append(folder, "serve", result)
    return None


def tune(folder, device, clock):
    """Launches of our kernel for the headline model, into a table that is whole after each one."""
    from qsun.eval.speed.kernel_bench import KernelVariant, layers_of
    from qsun.eval.speed.kernel_tuning import parallel_timer, tune_kernels, write_table

    if device.type != "cuda":
        return print("launches are timed on a GPU", flush=True)
    gpu = torch.cuda.get_device_name()
    table = Path(folder) / f"{gpu.replace(' ', '-')}.json"

    def note(line):
        print(line, flush=True)
        if not clock.has_time():
            sys.exit(0)

    layers = layers_of(["llama-3.1-8b"], [])
    for bits in BITS:
        kind = KernelVariant(128, True, torch.bfloat16, device, bits)
        tune_kernels(layers, kind, gpu, parallel_timer, note, lambda shapes: write_table(shapes, gpu, table))
    return None


STAGES = {"tests": tests, "kernels": kernels, "step": step, "serve": serve, "tune": tune}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=60)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    STAGES[given.stage](given.folder, torch.device(given.device), Clock(0.9 * given.seconds))


if __name__ == "__main__":
    main()
