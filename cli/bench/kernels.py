"""`qsun bench kernels` and `qsun bench tune-kernels`: the product with packed weights, timed and tuned."""

from pathlib import Path

import typer

from qsun.cli.terminal import results, screen
from qsun.cli.terminal.device import use_device
from qsun.cli.terminal.options import whole_numbers
from qsun.errors import QsunError


def kernels(
    model: list[str] = typer.Option(
        [], help="Known model whose layer shapes to run; repeatable. Default on a GPU: all."
    ),
    shape: list[str] = typer.Option(
        [], help="Another shape, NxK; repeatable. Default on a CPU: 4096x4096, 14336x4096."
    ),
    rows: str = typer.Option(
        "", "--rows", "-m", help="Values of M, comma-separated. Default: 1,4,16,64,256; on a GPU all powers of 2."
    ),
    bits: int = typer.Option(4, help="2, 3, 4 or 8."),
    group_size: int = typer.Option(128, help="-1, 32, 64 or 128."),
    asym: bool = typer.Option(False, "--asym", help="With zero points."),
    device: str = typer.Option("", help="cpu or cuda. Default: a GPU if available."),
    threads: int = typer.Option(1, help="CPU threads."),
    rounds: int = typer.Option(25, help="Turns of each contender at each point."),
    seconds: float = typer.Option(3.0, help="Fewer turns if a point takes longer than this."),
    minutes: float = typer.Option(1e9, help="Leave out shapes that would start later.", show_default=False),
    out: Path | None = typer.Option(None, "--out", "-o", help="Folder for kernels.json and kernels.png."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object on stdout."),
) -> None:
    """Time the product with packed weights against F.linear in bfloat16 and against the installed peers.

    Contenders take turns on copies of their matrices that exceed the caches, in CUDA graphs on a GPU. Prints medians.

    Examples:

      qsun bench kernels --device cpu

      qsun bench kernels --model llama-3.1-8b --rows 1,8,64 -o out/kernels
    """
    import torch

    from qsun.eval.output.machine import describe_machine
    from qsun.eval.speed.kernel_bench import (
        KernelVariant,
        Patience,
        bench_kernels,
        kernel_figure,
        layers_of,
        report_text,
    )
    from qsun.eval.speed.model_shapes import MODEL_SHAPES

    where = use_device(device, threads)
    results.prepare(out)
    on_gpu = where.type == "cuda"
    if not model and not shape:
        model, shape = (list(MODEL_SHAPES), []) if on_gpu else ([], ["4096x4096", "14336x4096"])
    wanted = rows or ("1,2,4,8,16,32,64,128,256" if on_gpu else "1,4,16,64,256")
    result = bench_kernels(
        layers_of(model, shape),
        whole_numbers("rows", wanted),
        KernelVariant(group_size, not asym, torch.bfloat16, where, bits),
        Patience(rounds, seconds, minutes),
        screen.note,
    )
    result |= describe_machine(where)
    title = f"int{bits}, group {group_size}, {result['machine']}"
    results.save(out, "kernels", result, lambda: kernel_figure(result, title))
    results.show(result, as_json, report_text)


def tune_kernels(
    model: list[str] = typer.Option([], help="Known model whose layer shapes to tune; repeatable. Default: all."),
    shape: list[str] = typer.Option([], help="Another shape, NxK; repeatable."),
    bits: int = typer.Option(4, help="2, 3, 4 or 8."),
    group_size: int = typer.Option(128, help="-1, 32, 64 or 128."),
    asym: bool = typer.Option(False, "--asym", help="With zero points."),
    out: Path | None = typer.Option(None, "--out", "-o", help="Table to write or extend. Default: the package's own."),
) -> None:
    """Search launch parameters of the product kernel on this GPU, and write the table that qsun reads from then on.

    Takes minutes a shape, as every launch is compiled, in up to 16 processes. An existing table is extended.

    Examples:

      qsun bench tune-kernels --model llama-3.1-8b

      qsun bench tune-kernels --shape 6144x4096 -o h200.json
    """
    if out is not None:
        results.prepare(out.parent)
        if out.is_dir():
            raise QsunError(f"table {out} is a folder; name a file in it")
    import torch

    from qsun.eval.speed.kernel_bench import KernelVariant, layers_of
    from qsun.eval.speed.kernel_tuning import parallel_timer, write_table
    from qsun.eval.speed.kernel_tuning import tune_kernels as search_launches
    from qsun.eval.speed.model_shapes import MODEL_SHAPES
    from qsun.kernels.launch_table import table_file

    if not torch.cuda.is_available():
        raise QsunError("launch parameters are timed on a GPU, and torch sees no CUDA device")
    layers = layers_of(model or ([] if shape else list(MODEL_SHAPES)), shape)
    gpu = torch.cuda.get_device_name()
    kind = KernelVariant(group_size, not asym, torch.bfloat16, torch.device("cuda"), bits)
    path = out or table_file(gpu)
    search_launches(layers, kind, gpu, parallel_timer, screen.note, lambda shapes: write_table(shapes, gpu, path))
    typer.echo(f"{path}: launches for {gpu}")
