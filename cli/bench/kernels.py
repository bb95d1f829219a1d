"""`qsun bench kernels` and `qsun bench tune-kernels`: the int4 product, timed and tuned."""

import json
from pathlib import Path
from typing import Any

import typer

from qsun.cli.terminal import screen
from qsun.errors import QsunError


def kernels(
    model: list[str] = typer.Option([], help="Known model whose layer shapes to run; repeat. Default on a GPU: all."),
    shape: list[str] = typer.Option([], help="Another shape, NxK; repeat. Default on a CPU: 4096x4096, 14336x4096."),
    rows: str = typer.Option(
        "", "--rows", "-m", help="Values of M, comma-separated. Default: 1,4,16,64,256; on a GPU all powers of 2."
    ),
    group_size: int = typer.Option(128, help="-1, 32, 64 or 128."),
    asym: bool = typer.Option(False, "--asym", help="With zero points."),
    device: str = typer.Option("", help="cpu or cuda. Default: a GPU where there is one."),
    threads: int = typer.Option(1, help="CPU threads."),
    rounds: int = typer.Option(25, help="Turns of each contender at each point."),
    seconds: float = typer.Option(3.0, help="Fewer turns where a point takes longer than this."),
    minutes: float = typer.Option(1e9, help="Leave out shapes that would start later.", show_default=False),
    out: Path | None = typer.Option(None, "--out", "-o", help="Folder for kernels.json and kernels.png."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object on stdout."),
) -> None:
    """Time the int4 product against F.linear in bfloat16 and against the peers that are installed.

    Contenders take turns on copies of their matrices that exceed the caches; on a GPU in CUDA graphs. Medians.

    Examples:

      qsun bench kernels --device cpu

      qsun bench kernels --model llama-3.1-8b --rows 1,8,64 -o out/kernels
    """
    import torch

    from qsun.eval.speed.clock import machine
    from qsun.eval.speed.kernel_bench import KernelVariant, Patience, bench_kernels, layers_of, plot_kernels
    from qsun.eval.speed.model_shapes import MODEL_SHAPES

    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = where.type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise QsunError("device cuda: torch sees no CUDA device here; use --device cpu")
    if not model and not shape:
        model, shape = (list(MODEL_SHAPES), []) if on_gpu else ([], ["4096x4096", "14336x4096"])
    wanted = rows or ("1,2,4,8,16,32,64,128,256" if on_gpu else "1,4,16,64,256")
    torch.set_num_threads(threads)
    result = bench_kernels(
        layers_of(model, shape),
        [int(M) for M in wanted.split(",")],
        KernelVariant(group_size, not asym, torch.bfloat16, where),
        Patience(rounds, seconds, minutes),
        screen.note,
    )
    result |= machine(where, threads)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "kernels.json").write_text(json.dumps(result, indent=1) + "\n")
        plot_kernels(result, f"int4, group {group_size}, {result['machine']}", out / "kernels.png")
    typer.echo(json.dumps(result) if as_json else _table(result))


def tune_kernels(
    model: list[str] = typer.Option([], help="Known model whose layer shapes to tune; repeat. Default: all."),
    shape: list[str] = typer.Option([], help="Another shape, NxK; repeat."),
    group_size: int = typer.Option(128, help="-1, 32, 64 or 128."),
    asym: bool = typer.Option(False, "--asym", help="With zero points."),
    out: Path | None = typer.Option(None, "--out", "-o", help="Table to write or add to. Default: the package's own."),
) -> None:
    """Search launch parameters of the int4 kernel on this GPU and write them as a table that is read from then on.

    Minutes for each shape: every launch tried is compiled. A table that is there already is added to.

    Examples:

      qsun bench tune-kernels --model llama-3.1-8b

      qsun bench tune-kernels --shape 6144x4096 -o h200.json
    """
    import torch

    from qsun.eval.speed.kernel_bench import KernelVariant, layers_of
    from qsun.eval.speed.kernel_tuning import gpu_timer, write_table
    from qsun.eval.speed.kernel_tuning import tune_kernels as search_launches
    from qsun.eval.speed.model_shapes import MODEL_SHAPES
    from qsun.kernels.launch_table import table_file

    if not torch.cuda.is_available():
        raise QsunError("launch parameters are timed on a GPU, and torch sees no CUDA device here")
    layers = layers_of(model or ([] if shape else list(MODEL_SHAPES)), shape)
    gpu = torch.cuda.get_device_name()
    kind = KernelVariant(group_size, not asym, torch.bfloat16, torch.device("cuda"))
    path = out or table_file(gpu)
    write_table(search_launches(layers, kind, gpu, gpu_timer, screen.note), gpu, path)
    typer.echo(f"{path}: launches for {gpu}")


def _table(result: dict[str, Any]) -> str:
    lines = [f"{result['machine']}, torch {result['torch']}, copy {result['copy_gb_per_s']:.0f} GB/s"]
    lines.append(
        f"{'model':<18}{'layer':<12}{'N':>6}{'K':>6}{'M':>5} {'kernel':<10}{'us':>10}{'x bf16':>8}{'% copy':>8}"
    )
    for row in result["rows"]:
        lines.append(
            f"{row['model']:<18}{row['layer']:<12}{row['N']:>6}{row['K']:>6}{row['M']:>5} {row['kernel']:<10}"
            f"{row['microseconds']:>10.1f}{row['ratio_to_bf16']:>8.2f}{row['bandwidth_percent']:>8.1f}"
        )
    for kernel, by_rows in result["geometric_mean"].items():
        ratios = "  ".join(f"M={M}: {ratio:.2f}" for M, ratio in by_rows.items())
        lines.append(f"geometric mean of {kernel} over bf16: {ratios}")
    return "\n".join(lines)
