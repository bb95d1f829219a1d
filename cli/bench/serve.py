"""`qsun bench serve`: load on any OpenAI-compatible server."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from qsun.cli.terminal import results, screen
from qsun.cli.terminal.options import names
from qsun.errors import QsunError
from qsun.eval.output.table import Table

if TYPE_CHECKING:
    from qsun.eval.load.rounds import LoadSettings, Measured

_AGAINST = "requests-against.jsonl"


def serve(
    url: str = typer.Argument(..., help="Server, such as http://127.0.0.1:8000: qsun serve, qsun route, vLLM."),
    models: str = typer.Option("", help="Names, comma-separated, the busiest first. Default: all of /v1/models."),
    skew: float = typer.Option(1.0, help="Zipf exponent over models; 0 is uniform."),
    rate: float = typer.Option(0.0, help="Open loop: requests/s, each sent when it is due."),
    concurrency: int = typer.Option(0, help="Closed loop instead: requests in flight, to saturate the server."),
    requests: int = typer.Option(100, help="Number of requests to measure."),
    warm_up: int = typer.Option(8, help="Requests to send first without measuring them."),
    prompt: str = typer.Option(
        "fixed:128", help="Prompt tokens: fixed:N, uniform:A-B or lognormal:MEDIAN,SIGMA[,MAX]."
    ),
    output: str = typer.Option("fixed:64", help="max_tokens of an answer, in the same forms."),
    prompts: Path | None = typer.Option(None, help=".jsonl with prompt or messages, instead of random prompts."),
    endpoint: str = typer.Option("completions", help="completions or chat."),
    deadline: float = typer.Option(120.0, help="Seconds before a request is abandoned."),
    max_in_flight: int = typer.Option(1024, help="Requests due beyond this number in flight count as not sent."),
    slo_ttft: float = typer.Option(float("inf"), help="Goodput: milliseconds to the first token.", show_default=False),
    slo_tpot: float = typer.Option(float("inf"), help="Goodput: milliseconds a further token.", show_default=False),
    decode_workers: int = typer.Option(1, help="Decode workers of the server, to report throughput of each."),
    against: str = typer.Option("", help="Another server to compare with, in alternate rounds."),
    rounds: int = typer.Option(0, help="Rounds. Default: 1, or 4 with --against."),
    api_key_file: Path | None = typer.Option(None, help="File whose first key is sent; # begins a comment."),
    extra_body: str = typer.Option("{}", help='Fields of every body, such as {"ignore_eos": true} for qsun and vLLM.'),
    seed: int = typer.Option(0, help="Random seed of arrivals, models, lengths and the choice of --prompts."),
    prompt_seed: str = typer.Option("", help="Random seed of random prompts. Default: a fresh one for each run."),
    out: Path | None = typer.Option(None, "--out", "-o", help="Folder for load.json, requests*.jsonl and load.png."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object on stdout."),
) -> None:
    """Load a server with Poisson arrivals over Zipf-distributed models; report throughput, TTFT, TPOT, goodput, errors.

    Latencies count from when a request was due, and from its send. See docs/capacity.md.

    Examples:

      qsun bench serve http://127.0.0.1:8000 --rate 4 --requests 200 --slo-ttft 500 --slo-tpot 50 -o out/load

      qsun bench serve http://127.0.0.1:8000 --models math,code --concurrency 32 --extra-body '{"ignore_eos": true}'

      qsun bench serve http://127.0.0.1:8000 --against http://127.0.0.1:8100 --rate 2
    """
    from qsun.eval.load.client import Target
    from qsun.eval.load.plan import read_prompts
    from qsun.eval.load.report import load_text
    from qsun.eval.load.rounds import OURS, THEIRS, LoadSettings, load_result, run_load
    from qsun.eval.load.service_level import ServiceLevel
    from qsun.eval.load.workload import Lengths
    from qsun.serve.http.keys import read_keys

    level = ServiceLevel(slo_ttft, slo_tpot)
    if decode_workers < 1:
        raise QsunError(f"decode-workers {decode_workers} is out of range; use 1 or more")
    served = tuple(names(models))
    rows = read_prompts(prompts, endpoint) if prompts else ()
    lengths = (Lengths.parse(prompt), Lengths.parse(output))
    turns = rounds or (4 if against else 1)
    settings = LoadSettings(
        *lengths, served, skew, rows, rate, concurrency, requests, warm_up, turns, max_in_flight, seed, prompt_seed
    )
    key, extra = (*read_keys(api_key_file), "")[0], _object(extra_body)
    urls = {OURS: url} | ({THEIRS: against} if against else {})
    targets = {name: Target(address, endpoint, key, extra, deadline) for name, address in urls.items()}
    results.prepare(out)
    with screen.progress(quiet=as_json) as progress:
        measured = run_load(targets, settings, progress, screen.note)
    result: dict[str, Any] = {"urls": urls, "load": _described(settings, prompts or prompt, output)}
    result |= load_result(measured, level, decode_workers)
    if out is not None:
        _write(out, result, measured)
    if as_json:
        typer.echo(json.dumps(result))
        return
    for name, address in urls.items():
        typer.echo(f"{address}: {result['load']}\n{load_text(result[name], level)}")
    if against:
        typer.echo(_compared(result))


def _described(load: "LoadSettings", prompts: Path | str, output: str) -> str:
    """Describe a load; `prompts` is the file of them, or the lengths of random ones."""
    how = f"{load.rate:g} requests/s, open loop" if load.rate else f"{load.concurrency} requests in flight, closed loop"
    own = [key for key in ("model", "max_tokens") if any(key in row for row in load.rows)]
    file = str(prompts).encode(errors="backslashreplace").decode()  # its name may be any bytes
    what = f"of {file} with their {' and '.join(own)}" if own else f"of {file}" if load.rows else file
    return f"{how}, {load.requests} requests, skew {load.skew:g}, prompts {what}, outputs {output}, seed {load.seed}"


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise QsunError(f"extra-body {text!r:.60} is not JSON ({error.msg})") from None
    except (ValueError, RecursionError):
        raise QsunError(f"extra-body {text!r:.60} has a number of too many digits, or nests too deep") from None
    if not isinstance(found, dict):
        raise QsunError(f'extra-body {text!r:.60} is not a JSON object; use one such as {{"ignore_eos": true}}')
    return found


def _compared(result: dict[str, Any]) -> str:
    rounds = [{"round": "geometric mean"} | result["ratios"]]
    rounds += [{"round": f"round {number}"} | one for number, one in enumerate(result["ratios_by_round"], 1)]
    columns = {name: f"{{{name}:.3f}}" for name in result["ratios"]}
    table = Table.of(rounds, {"": "{round}"} | columns)
    return f"{result['urls']['url']} over {result['urls']['against']}:\n{table.text()}"


def _write(out: Path, result: dict[str, Any], measured: "Measured") -> None:
    from qsun.eval.load.report import load_figure, write_records

    records = {name: measured.all_records(name) for name in measured.rounds}
    named = {result["urls"][name]: found for name, found in records.items()}
    results.save(out, "load", result, lambda: load_figure(named, result["load"]))
    (out / _AGAINST).unlink(missing_ok=True)  # an earlier run's
    for name, found in records.items():
        write_records(found, out / ("requests.jsonl" if name == "url" else _AGAINST))
