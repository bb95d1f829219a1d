"""`qsun bench adapters`: many unmerged adapters against one full prefill module."""

from pathlib import Path

import typer

from qsun.cli.terminal import results, screen
from qsun.cli.terminal.device import use_device
from qsun.config import check_one_of


def adapters(
    decode: str = typer.Option("demo", help="Decode module: directory, hub id, or 'demo'."),
    prefill_weights: str = typer.Option("base", help="What adapters share: base, or decode (the decode module's own)."),
    count: int = typer.Option(16, min=1, help="Adapters, all different, with a prompt each."),
    rank: int = typer.Option(16, min=1, help="Adapter rank, on all linear layers of the blocks."),
    prompt: int = typer.Option(64, min=2, help="Tokens of each prompt."),
    rounds: int = typer.Option(9, min=1, help="Prefill turns of each side."),
    steps: int = typer.Option(48, min=1, help="Decode turns of each side."),
    dtype: str | None = typer.Option(None, help="Activation dtype. Default: the decode module's."),
    device: str | None = typer.Option(None, help="cpu or cuda. Default: a GPU if available."),
    threads: int = typer.Option(1, min=1, help="CPU threads."),
    out: Path | None = typer.Option(None, "--out", "-o", help="Folder for adapters.json."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object on stdout."),
) -> None:
    """Compare a batch whose prompts have an adapter each with one whose prompts share one full module, in turns.

    Times prefill, a decode step over what was prefilled, and loading one more adapter; counts bytes. On a CPU the times
    are CPU seconds of this process, which other programs disturb least. Adapters are random: only speed is compared.

    Examples:

      qsun bench adapters -o out/adapters

      qsun bench adapters --decode out/int4 --prefill-weights decode --count 32
    """
    where = use_device(device, threads)
    check_one_of("--prefill-weights", prefill_weights, ("base", "decode"))
    results.prepare(out)
    from qsun.eval.output.machine import describe_machine
    from qsun.eval.speed.adapter_speed import AdapterRun, bench_adapters, report_text
    from qsun.runtime.decode_module import load_decode

    module = load_decode(decode, where, dtype)
    run = AdapterRun(count, rank, prompt, rounds, steps, prefill_weights == "decode")
    result = bench_adapters(module, run, screen.note) | describe_machine(where)
    results.save(out, "adapters", result)
    results.show(result, as_json, report_text)
