"""`qsun demo-data`: training, validation and test data of the three embedded tasks."""

from pathlib import Path

import typer


def demo_data(
    out: Path = typer.Option(..., "--out", "-o", help="Directory to create."),
    count: int = typer.Option(8192, help="Training examples per task."),
    held_out: int = typer.Option(500, help="Validation and test examples per task."),
    seed: int = typer.Option(0, help="Random seed. Splits never overlap."),
) -> None:
    """Write math, code and tool-call data for the demo base: TASK-SPLIT.jsonl with prompts and responses.

    Example:

      qsun demo-data -o data/
    """
    from qsun.demo.tasks import SPLITS, TASKS, examples, write_jsonl
    from qsun.errors import QsunError
    from qsun.model.output_dir import check_free

    if count < 1 or held_out < 1:
        raise QsunError(f"--count {count}, --held-out {held_out}: give at least one example")
    check_free(out, resume=False)
    drawn = {
        f"{task}-{split}.jsonl": examples(task, split, count if split == "train" else held_out, seed)
        for task in TASKS
        for split in SPLITS
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in drawn.items():
        write_jsonl(out / name, rows)
        typer.echo(f"{out / name}: {len(rows)} examples, such as {rows[0].prompt!r} {rows[0].response}")
