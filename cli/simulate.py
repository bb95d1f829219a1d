"""`qsun simulate`: a discrete-event simulation of conventional disaggregation, SUN and QSUN."""

import math
from pathlib import Path
from typing import Any

import typer

from qsun.cli.terminal import results, screen
from qsun.cli.terminal.options import names, numbers
from qsun.errors import QsunError

_OF_DRAWN_REQUESTS = ("models", "skew", "rate", "need", "prompt", "output", "requests")


def simulate(
    context: typer.Context,
    curves: str = typer.Option(..., help="speed.json of qsun bench speed, or computed:MODEL: bounds of an H200."),
    models: str = typer.Option("3", help="Number of models, or their names, comma-separated, the busiest first."),
    decode_workers: int = typer.Option(4, help="Decode workers of every system."),
    skew: str = typer.Option("0,0.5,1,1.5,2", help="Zipf exponents over models, comma-separated; 0 is uniform."),
    rate: str = typer.Option("", help="Requests/s, comma-separated. Default: search the highest rate of each system."),
    need: float = typer.Option(0.0, help="Without --rate: requests/s to find the fewest workers for."),
    trace: Path | None = typer.Option(
        None, help="Replay requests.jsonl of qsun bench serve instead of drawing requests."
    ),
    prompt: str = typer.Option(
        "lognormal:512,0.8,4096", help="Prompt tokens: fixed:N, uniform:A-B, lognormal:MED,SIGMA."
    ),
    output: str = typer.Option("lognormal:200,0.8,2048", help="Output tokens, in the same forms."),
    max_batch: int = typer.Option(64, help="Rows of a decode worker."),
    kv_tokens: int = typer.Option(0, help="KV of a decode worker in tokens. Default: from --memory-gb, or no limit."),
    memory_gb: float = typer.Option(0.0, help="Memory of a decode worker, for weights and KV."),
    prefill_workers: int = typer.Option(0, help="Prefill workers of each model. Default: enough to be half busy."),
    prefill_tokens: int = typer.Option(
        0, help="Prompt tokens a step of in-process engines, which need no prefill workers."
    ),
    assignment: str = typer.Option("load", help="Assignment of conventional decode workers to models: load or equal."),
    policy: str = typer.Option("least_outstanding_tokens", help="Routing policy, or power_of_two, or round_robin."),
    transfer_ms: float = typer.Option(0.0, help="KV transfer from a prefill worker to a decode worker."),
    overhead_ms: float = typer.Option(0.0, help="Milliseconds added to every decode step."),
    qsun_variant: str = typer.Option("qsun", help="qsun, or qsun+head with an int4 head as well."),
    slo_ttft: float = typer.Option(0.0, help="TTFT objective, ms. Default: 4 prefills and 10 TPOTs."),
    slo_tpot: float = typer.Option(0.0, help="TPOT objective, ms. Default: twice SUN's step with a full batch."),
    target: float = typer.Option(0.95, help="Share of requests that must meet both objectives."),
    requests: int = typer.Option(2000, help="Fewest requests of a simulation."),
    seed: int = typer.Option(0, help="Random seed."),
    out: Path | None = typer.Option(None, "--out", "-o", help="Folder for simulate.json and simulate.png."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object on stdout."),
) -> None:
    """Simulate conventional disaggregation, SUN and QSUN on the same workers, from measured step times.

    Without --rate, find the highest rate that each system serves within the SLO at every skew, and the decode workers
    that each needs for one rate. docs/capacity.md states the assumptions.

    Examples:

      qsun simulate --curves out/speed/speed.json --models 4 --decode-workers 4 --assignment equal -o out/simulate

      qsun simulate --curves out/speed/speed.json --models 3 --skew 1 --rate 0.5,1,2

      qsun simulate --curves computed:llama-3.1-8b --models 8 --decode-workers 8 --memory-gb 141
    """
    given = [name for name in _OF_DRAWN_REQUESTS if _is_given(context, name)]
    if trace and given:
        raise QsunError(f"--trace brings its own requests; omit --{' and --'.join(given)}")
    if not 0 <= need < math.inf:
        raise QsunError(f"need {need:g} is out of range; use requests/s above 0")
    if need and rate:
        raise QsunError("--need belongs to the search that --rate replaces; give one of them")
    results.prepare(out)
    from qsun.eval.load.workload import Lengths, Workload, read_trace
    from qsun.eval.simulate.capacity import Scenario, default_level
    from qsun.eval.simulate.compared_systems import Deployment
    from qsun.eval.simulate.curves import load_curves
    from qsun.eval.simulate.sweep import by_count, simulation_result

    found = load_curves(curves)
    skews = numbers("skew", skew) or [0.0]
    replayed = read_trace(trace) if trace else None
    served = _names(models) if replayed is None else by_count(replayed)
    workload = Workload(served, skews[0], Lengths.parse(prompt), Lengths.parse(output), seed)
    deployment = Deployment(
        max_batch,
        kv_tokens or None,
        memory_gb * 1e9 or None,
        prefill_workers or None,
        prefill_tokens,
        assignment,
        policy,
        transfer_ms,
        overhead_ms,
        qsun_variant,
    )
    level = default_level(replayed or workload.sample(), found, max_batch, slo_ttft, slo_tpot)
    scenario = Scenario(workload, found, deployment, level, target, requests)
    with screen.progress(quiet=as_json) as progress:
        rates = numbers("rate", rate)
        result = simulation_result(scenario, decode_workers, skews, rates, need or None, replayed, progress)
    _show(result, out, as_json)


def _show(result: dict[str, Any], out: Path | None, as_json: bool) -> None:
    from qsun.eval.simulate.report import report_figure, report_text

    results.save(out, "simulate", result, lambda: report_figure(result))
    if beyond := max(row.get("steps_beyond_curves", 0.0) for row in result["rows"]):
        screen.note(f"up to {beyond:.0%} of steps have larger batches or contexts than the curves; docs/capacity.md")
    results.show(result, as_json, report_text)


def _is_given(context: typer.Context, option: str) -> bool:
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def _names(models: str) -> tuple[str, ...]:
    if models.isdecimal():
        return tuple(f"model-{number + 1}" for number in range(int(models)))
    return tuple(names(models))
