"""`qsun bench engine`: shared decode against partitioned decode in the in-process engine, and its simulation."""

import json
from pathlib import Path

import typer

from qsun.cli.terminal import screen
from qsun.cli.terminal.device import check_device
from qsun.errors import QsunError


def engine(
    decode: str = typer.Option("demo", help="Decode module: directory, hub id, or 'demo'."),
    prefill: list[str] = typer.Option(["demo"] * 3, help="Prefill module of one model; repeat for more."),
    rate: float = typer.Option(40.0, help="Requests a second, Poisson."),
    requests: int = typer.Option(200, min=1, help="Requests of a round."),
    skew: float = typer.Option(1.0, help="Zipf skew over the models; 0 is uniform."),
    prompt: str = typer.Option("uniform:16-128", help="Prompt tokens: fixed:N, uniform:A-B, lognormal:MEDIAN,SIGMA."),
    output: str = typer.Option("uniform:16-64", help="Output tokens, in the same words."),
    rounds: int = typer.Option(5, min=1, help="Rounds of both, in turns."),
    max_batch: int = typer.Option(64, min=1, help="Requests at a time."),
    prefill_tokens: int = typer.Option(512, min=1, help="Prompt tokens read between two decode steps."),
    seed: int = typer.Option(0, help="Of the trace."),
    dtype: str | None = typer.Option(None, help="Of activations. Default: the decode module's."),
    device: str | None = typer.Option(None, help="cpu or cuda. Default: a GPU where there is one."),
    threads: int = typer.Option(1, min=1, help="CPU threads."),
    out: Path | None = typer.Option(None, "--out", "-o", help="Folder for engine.json."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object on stdout."),
) -> None:
    """Run one trace through the in-process engine twice: one decode batch for all models, and one for each in turns.

    Turns are what a server of several whole fine-tunes does: each has a decoder of its own. The simulator is given step
    times measured on this engine, and predicts both runs.

    Examples:

      qsun bench engine -o out/engine

      qsun bench engine --decode out/int4 --prefill out/math --prefill out/code --rate 10
    """
    check_device(device)
    import torch

    from qsun.eval.load.workload import Lengths, Workload
    from qsun.eval.simulate.engine_comparison import EngineComparison, study, table
    from qsun.eval.speed.clock import machine
    from qsun.runtime.decode_module import load_decode
    from qsun.runtime.prefill_module import load_prefill

    if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise QsunError(f"dtype {dtype!r} is not known; use float32, bfloat16 or float16")
    torch.set_num_threads(threads)
    module = load_decode(decode, device, dtype)
    weight = next(module.model.parameters())
    loaded = {name: load_prefill(name, module, weight.dtype) for name in dict.fromkeys(prefill)}
    models = {f"model-{number}": loaded[name] for number, name in enumerate(prefill, 1)}
    workload = Workload(tuple(models), skew, Lengths.parse(prompt), Lengths.parse(output), seed)
    with screen.progress(quiet=as_json) as progress:
        runs = EngineComparison(module, models, max_batch, prefill_tokens)
        result = study(runs, workload.trace(rate, requests), rounds, progress)
    result |= {"rate": rate, "skew": skew, "prompt": prompt, "output": output, "models": len(models)}
    result |= machine(weight.device, torch.get_num_threads())
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "engine.json").write_text(json.dumps(result, indent=1) + "\n")
    typer.echo(json.dumps(result) if as_json else table(result))
