"""What commands show on stderr: errors, notes, and progress (a bar on a terminal, plain lines elsewhere)."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qsun.progress import Progress as ProgressCallback

console = Console(stderr=True, highlight=False, soft_wrap=True)
_LINE_EVERY_SECONDS = 5.0


def error(message: str) -> None:
    """Print an error as one line, which no newline of the message breaks."""
    console.print(f"[bold red]error:[/] {escape(' '.join(message.split()))}")


def note(message: str) -> None:
    """Print a line that is not part of the result."""
    console.print(escape(message))


class Interrupted(SystemExit):
    """Ctrl-C, and the user has been told."""

    EXIT_CODE = 130  # that of a program which SIGINT ends

    def __init__(self) -> None:
        super().__init__(self.EXIT_CODE)


def interrupted(message: str) -> NoReturn:
    """Say in one line what an interrupted command leaves, and exit."""
    error(f"interrupted; {message}")
    raise Interrupted


def note_fresh_start(out: Path) -> None:
    """Say so where --resume finds nothing of an earlier run."""
    from qsun.model.output_dir import partial_path

    if not partial_path(out).exists():
        note(f"nothing to resume: {partial_path(out)} does not exist; starting from the beginning")


def show_warnings() -> None:
    """Print the library's warnings as short lines."""
    _show(logging.WARNING, "warning: %(message)s")


def show_log() -> None:
    """Print the log of a server, with times."""
    _show(logging.INFO, "%(asctime)s %(levelname)s %(message)s")


def _show(level: int, line: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(line))
    logger = logging.getLogger("qsun")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(level)


@contextmanager
def progress(quiet: bool) -> Iterator[ProgressCallback]:
    """Yield a callback (label, done, total) that draws a bar on a terminal, and elsewhere prints a line every 5 s."""
    if quiet:
        yield lambda *_: None
    elif console.is_terminal:
        with _bar() as bar:
            task = bar.add_task("", total=None)
            yield lambda label, done, total: bar.update(task, description=label, completed=done, total=total)
    else:
        yield _Lines()


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description:<42.42}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
    )


class _Lines:
    def __init__(self) -> None:
        self.started = self.printed = time.monotonic()

    def __call__(self, label: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.printed < _LINE_EVERY_SECONDS and done < total:
            return
        self.printed = now
        elapsed = now - self.started
        left = elapsed / max(done, 1) * (total - done)
        print(f"{done}/{total}  {elapsed:.0f} s, {left:.0f} s left  {label}", file=sys.stderr, flush=True)
