"""`qsun bench engine`: shared against partitioned decode in the in-process engine, and their simulation."""

from pathlib import Path

import typer

from qsun.cli.terminal import results, screen
from qsun.cli.terminal.device import use_device


def engine(
    decode: str = typer.Option("demo", help="Decode module: directory, hub id, or 'demo'."),
    prefill: list[str] = typer.Option(["demo"] * 3, help="Prefill module of one model; repeat for more."),
    rate: float = typer.Option(40.0, help="Requests a second, Poisson."),
    requests: int = typer.Option(200, min=1, help="Requests of a round."),
    skew: float = typer.Option(1.0, help="Zipf skew over the models; 0 is uniform."),
    prompt: str = typer.Option("uniform:16-128", help="Prompt tokens: fixed:N, uniform:A-B, lognormal:MEDIAN,SIGMA."),
    output: str = typer.Option("uniform:16-64", help="Output tokens, in the same forms."),
    rounds: int = typer.Option(5, min=1, help="Rounds of both, in turns."),
    max_batch: int = typer.Option(64, min=1, help="Requests that decode at the same time."),
    prefill_tokens: int = typer.Option(512, min=1, help="Prompt tokens read between two decode steps."),
    seed: int = typer.Option(0, help="Random seed of the trace."),
    dtype: str | None = typer.Option(None, help="Of activations. Default: the decode module's."),
    device: str | None = typer.Option(None, help="cpu or cuda. Default: a GPU if available."),
    threads: int = typer.Option(1, min=1, help="CPU threads."),
    out: Path | None = typer.Option(None, "--out", "-o", help="Folder for engine.json."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object on stdout."),
) -> None:
    """Run a trace through the in-process engine twice: one decode batch for all models, and one for each in turns.

    Turns are what a server of several whole fine-tunes does: each has its own decoder. The simulator gets step times
    measured on this engine and predicts both runs.

    Examples:

      qsun bench engine -o out/engine

      qsun bench engine --decode out/int4 --prefill out/math --prefill out/code --rate 10
    """
    where = use_device(device, threads)
    results.prepare(out)
    from qsun.eval.load.workload import Lengths, Workload
    from qsun.eval.output.machine import describe_machine
    from qsun.eval.simulate.engine_comparison import EngineComparison, check_trace, compare_in_rounds, report_text
    from qsun.runtime.decode_module import load_decode
    from qsun.runtime.prefill_module import load_prefill

    named = {f"model-{number}": name for number, name in enumerate(prefill, 1)}
    workload = Workload(tuple(named), skew, Lengths.parse(prompt), Lengths.parse(output), seed)
    trace = workload.trace(rate, requests)
    check_trace(trace)
    module = load_decode(decode, where, dtype)
    loaded = {name: load_prefill(name, module, module.model.dtype) for name in dict.fromkeys(prefill)}
    models = {model: loaded[name] for model, name in named.items()}
    with screen.progress(quiet=as_json) as progress:
        runs = EngineComparison(module, models, max_batch, prefill_tokens)
        result = compare_in_rounds(runs, trace, rounds, progress)
    result |= {"rate": rate, "skew": skew, "prompt": prompt, "output": output, "models": len(models)}
    result |= describe_machine(where)
    results.save(out, "engine", result)
    results.show(result, as_json, report_text)
