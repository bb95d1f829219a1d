"""`qsun bench speed`: a decode step of SUN against one of QSUN."""

from pathlib import Path

import typer

from qsun.cli.terminal import results, screen
from qsun.cli.terminal.device import use_device
from qsun.cli.terminal.options import whole_numbers
from qsun.errors import QsunError


def speed(
    shape: str = typer.Option("", help="Known model, made in memory with random weights, such as llama-3.2-1b."),
    decode: str = typer.Option("", help="Instead of --shape: an int4 decode module on disk."),
    base: str = typer.Option("", help="With --decode: its full-precision base. Default: the module, dequantized."),
    lm_head: str = typer.Option(
        "both",
        "--lm-head",
        help="With --shape, output projection of QSUN: bf16 (as qsun quantize leaves it), int4, both.",
    ),
    bits: str = typer.Option("4", help="With --shape: bits of QSUN's decode modules, comma-separated, such as 4,2."),
    batches: str = typer.Option("1,4,16,64", help="Rows of a decode batch, comma-separated."),
    contexts: str = typer.Option("128,1024", help="Tokens that a step attends to, comma-separated."),
    prompts: str = typer.Option("", help="Further prompt lengths to time the prefill of, for qsun simulate."),
    steps: int = typer.Option(32, help="Timed steps of each contender at each point."),
    seconds: float = typer.Option(60.0, help="Fewer steps if a point takes longer than this."),
    device: str = typer.Option("", help="cpu or cuda. Default: a GPU if available."),
    threads: int = typer.Option(0, help="CPU threads. Default: torch's choice, one for each core."),
    out: Path | None = typer.Option(None, "--out", "-o", help="Folder for speed.json and speed.png."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object on stdout."),
) -> None:
    """Time decode steps with a bf16 decode module (SUN) and with an int4 one (QSUN), and the prefill before them.

    Contenders take turns step by step, with the step that `qsun.generate` uses. Prints medians; see docs/speed.md.

    Examples:

      qsun bench speed --shape llama-3.2-1b --threads 2 -o out/speed

      qsun bench speed --decode out/int4 --base ./Llama-3.2-1B --batches 1,8
    """
    where = use_device(device, threads)
    if bool(shape) == bool(decode):
        raise QsunError("give either --shape NAME or --decode DIR" + (", not both" if shape else ""))
    if base and not decode:
        raise QsunError("--base needs --decode; --shape makes its own base")
    results.prepare(out)
    from qsun.eval.output.machine import describe_machine
    from qsun.eval.speed.contenders import loaded_contenders, made_contenders
    from qsun.eval.speed.decode_speed import Points, bench_speed
    from qsun.eval.speed.report import report_text, speed_figure

    points = Points(
        whole_numbers("batches", batches),
        whole_numbers("contexts", contexts),
        steps,
        seconds,
        whole_numbers("prompts", prompts),
    )
    if decode:
        contenders = loaded_contenders(decode, base or None, where)
    else:
        contenders = made_contenders(shape, lm_head, where, bits=whole_numbers("bits", bits))
    result = bench_speed(contenders, points, screen.note) | describe_machine(where)
    results.save(out, "speed", result, lambda: speed_figure(result))
    results.show(result, as_json, report_text)
