"""`qsun bench speculation`: what drafted tokens save on your own prompts."""

from pathlib import Path

import typer

from qsun.cli.terminal import results, screen
from qsun.cli.terminal.device import use_device
from qsun.cli.terminal.options import whole_numbers
from qsun.errors import QsunError


def speculation(
    decode: str = typer.Argument(..., help="Decode module: directory, hub id, or 'demo'."),
    data: list[str] = typer.Option(..., help="Prompts, as qsun tune reads them; may be repeated."),
    prefill: str = typer.Option("", help="Prefill module that reads the prompts. Default: the decode module's base."),
    limit: int = typer.Option(64, min=1, help="Prompts to answer."),
    batch: str = typer.Option("1,8", help="Batch sizes, comma-separated."),
    drafts: str = typer.Option("4,8", help="Longest drafts to try, comma-separated; 0 is tried in any case."),
    max_tokens: int = typer.Option(64, min=1, help="Longest answer, in tokens."),
    dtype: str | None = typer.Option(None, help="Of activations. Default: the decode module's."),
    threads: int = typer.Option(0, min=0, help="CPU threads. Default: as torch chooses."),
    out: Path | None = typer.Option(None, "--out", "-o", help="Folder for speculation.json."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object on stdout."),
) -> None:
    """Answer prompts with and without drafted tokens, in turns: tokens a step, drafts that held, and the speed-up.

    Examples:

      qsun bench speculation out/int4 --prefill out/calls --data calls-test.jsonl

      qsun bench speculation demo --data prompts.jsonl --batch 1,4,16 --drafts 2,4,8,16
    """
    where = use_device("cpu", threads)
    results.prepare(out)
    from qsun.eval.output.machine import describe_machine
    from qsun.eval.speed.speculation import compare_speculation, report_text
    from qsun.model.pairing import find_base
    from qsun.runtime.decode_module import load_decode
    from qsun.runtime.prefill_module import load_prefill
    from qsun.tuning.examples import read_examples

    batches, lengths = whole_numbers("batch", batch), whole_numbers("drafts", drafts, least=0)
    if not batches:
        raise QsunError("batch is empty; use sizes of 1 or more, such as 1,8")
    module = load_decode(decode, where, dtype)
    reader = load_prefill(prefill or find_base(decode)[1], module, module.model.dtype)
    if module.tokenizer is None:
        raise QsunError(f"{decode} has no tokenizer; speculation is measured on text")
    positions = module.model.config.max_position_embeddings
    most = positions - max_tokens
    if most < 1:
        raise QsunError(f"max_tokens {max_tokens} leaves no room for a prompt in the model's {positions} positions")
    found, _ = read_examples(data, module.tokenizer, most, "prompts")
    with screen.progress(quiet=as_json) as progress:
        rows = [
            row
            for size in batches
            for row in compare_speculation(module, reader, found[:limit], size, lengths, max_tokens, progress)
        ]
    result = {"decode": decode, "prefill": prefill, "rows": rows} | describe_machine(where)
    results.save(out, "speculation", result)
    results.show(result, as_json, report_text)
