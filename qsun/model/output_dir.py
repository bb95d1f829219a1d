"""The unfinished output, OUT.partial: files are laid out first and filled part by part, and appear by one rename."""

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from qsun.errors import QsunError, ResumeError
from qsun.model.checkpoint import INDEX_FILE, SINGLE_FILE, STORED_DTYPES, read_json
from qsun.model.manifest import write_json

log = logging.getLogger(__name__)
Part = Mapping[str, tuple[str, tuple[int, ...]]]  # the safetensors dtype and the shape of each tensor by name
MAX_SHARD_BYTES = 4 << 30
_SMALL_FIRST = list(STORED_DTYPES)
_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}


def stored_as(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    """Return how safetensors describes a tensor, which may be on the meta device."""
    return _NAMES[tensor.dtype], tuple(tensor.shape)


@dataclass(frozen=True)
class Shard:
    """A safetensors file: its name, its header, and the first and last byte of each tensor after it."""

    name: str
    header: bytes
    spans: dict[str, tuple[int, int]]

    @property
    def data_bytes(self) -> int:
        return max((end for _, end in self.spans.values()), default=0)

    @property
    def size_bytes(self) -> int:
        return len(self.header) + self.data_bytes


def lay_out(parts: Iterable[Part], max_shard_bytes: int | None = None) -> list[Shard]:
    """Place every tensor of a model in its files: one model.safetensors, or several where they would be too large.

    Parts follow each other, and none is cut: one that is larger than the limit (default: 4 GiB) gets its own file.
    Within a part, tensors are in the order in which safetensors writes them.
    """
    files: list[list[Part]] = [[]]
    filled = 0
    for part in parts:
        size = _shard("", [part]).size_bytes
        if files[-1] and filled + size > (max_shard_bytes or MAX_SHARD_BYTES):
            files.append([])
            filled = 0
        files[-1].append(part)
        filled += size
    if len(files) == 1:
        return [_shard(SINGLE_FILE, files[0])]
    return [_shard(f"model-{n:05d}-of-{len(files):05d}.safetensors", file) for n, file in enumerate(files, 1)]


def _shard(name: str, parts: list[Part]) -> Shard:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    spans, offset = {}, 0
    for part in parts:
        for tensor in sorted(part, key=lambda tensor: (-_SMALL_FIRST.index(part[tensor][0]), tensor)):
            dtype, shape = part[tensor]
            end = offset + STORED_DTYPES[dtype].itemsize * torch.Size(shape).numel()
            entries[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
            spans[tensor] = (offset, end)
            offset = end
    head = json.dumps(entries, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return Shard(name, struct.pack("<Q", len(head)) + head, spans)


class ShardWriter:
    """Writes tensors to their places in files that have their full size from the start.

    Args:
        directory: holds the files, or those that an interrupted run of the same layout began.
    """

    def __init__(self, directory: Path, shards: list[Shard]):
        self.directory, self.shards = directory, shards
        for shard in shards:
            with open(os.open(directory / shard.name, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
                file.write(shard.header)
                file.truncate(shard.size_bytes)
        if len(shards) > 1:
            weight_map = {tensor: shard.name for shard in shards for tensor in shard.spans}
            total = sum(shard.data_bytes for shard in shards)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors; they are on the disk when this returns."""
        for shard in self.shards:
            here = sorted(tensors.keys() & shard.spans.keys(), key=shard.spans.__getitem__)
            if not here:
                continue
            with open(self.directory / shard.name, "r+b") as file:
                for name in here:
                    start, end = shard.spans[name]
                    raw = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
                    assert len(raw) == end - start, name
                    file.seek(len(shard.header) + start)
                    file.write(raw)
                file.flush()
                os.fsync(file.fileno())


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file. Raises OSError as other writes do, where safetensors has an error of its own."""
    try:
        save_file(tensors, path, {"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


@contextmanager
def _full_disk_is_said(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise QsunError(
            f"no space left on the disk of {out}; finished parts are kept: free some, and use --resume"
        ) from None


class Workdir:
    """An unfinished output directory: `module` becomes OUT; beside it are records of finished parts.

    Args:
        out: where the module will appear; must not exist.
        settings: everything that decides the bytes; a resumed run must have the same.
        lock: keep other runs out until `close`; False for the further processes of one run.
    Raises:
        QsunError: OUT exists, an interrupted run is there and `resume` is false, or another run is writing.
        ResumeError: the settings changed.
    """

    def __init__(self, out: Path, settings: dict[str, Any], resume: bool, lock: bool = True):
        self.out = out.absolute()
        self.root = partial_path(out)
        self.module = self.root / "module"
        check_free(out, resume, lock)
        if self.root.exists():
            self._check_settings(settings)
        with _full_disk_is_said(self.out):
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock = take_lock(self.root / "lock", "ab", fcntl.LOCK_EX) if lock else None
            for directory in (self.root / "parts", self.module):
                directory.mkdir(parents=True, exist_ok=True)
            if lock:
                write_json(self.root / "run.json", settings)

    def _check_settings(self, settings: dict[str, Any]) -> None:
        record = self.root / "run.json"
        if not record.exists() and not self.names(""):  # a run that ended as it began
            return
        before = read_json(record) if record.exists() else {}
        now = json.loads(json.dumps(settings))
        changed = [key for key in {**now, **before} if before.get(key) != now.get(key)]
        if changed:
            key = changed[0]
            raise ResumeError(
                f"cannot resume {self.root}: {key} was {before.get(key)!r} and is now {now.get(key)!r}; "
                "use the same settings, or delete that directory"
            )

    def part(self, name: str) -> Path:
        return self.root / "parts" / f"{name}.safetensors"

    def finished(self, name: str) -> bool:
        return self._record(name).exists()

    def note(self, name: str, record: dict[str, Any]) -> None:
        """Record that a part is finished, after its tensors were written."""
        write_json(self._record(name), record)

    def write(self, name: str, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Write a finished part to its own file, and then its record."""
        draft = self.part(name).with_suffix(".draft")
        save_tensors({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, draft)
        draft.replace(self.part(name))
        self.note(name, record)

    def record(self, name: str) -> dict[str, Any]:
        return read_json(self._record(name))

    def names(self, prefix: str) -> list[str]:
        """Return the finished parts whose names begin with this, sorted."""
        return sorted(path.stem for path in (self.root / "parts").glob(f"{prefix}*.json"))

    def drop(self, name: str) -> None:
        """Delete a part, its record first."""
        self._record(name).unlink()
        self.part(name).unlink(missing_ok=True)

    def _record(self, name: str) -> Path:
        return self.root / "parts" / f"{name}.json"

    def clear(self, keep: Iterable[str] = ()) -> Path:
        """Delete all files of the module but these, which an interrupted run left. Returns its directory."""
        for path in set(self.module.iterdir()) - {self.module / name for name in keep}:
            path.unlink()
        return self.module

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        """Release the lock, so that another run can continue this one. Raises QsunError where the disk is full."""
        if self._lock is not None:
            self._lock.close()
        if isinstance(error, OSError):
            with _full_disk_is_said(self.out):
                raise error

    def publish(self) -> None:
        """Make the module appear at OUT, and delete the parts."""
        self.module.rename(self.out)
        shutil.rmtree(self.root, ignore_errors=True)


def partial_path(out: Path) -> Path:
    out = out.absolute()  # "." has no name
    return out.with_name(out.name + ".partial")


def existing_parent(path: Path) -> Path:
    """Return the nearest directory above a path that exists."""
    return next(parent for parent in path.absolute().parents if parent.exists())


def written_bytes(out: Path) -> int:
    """Return the bytes on disk of what an interrupted run has written; its files have holes."""
    return sum(512 * file.stat().st_blocks for file in (partial_path(out) / "module").glob("*.safetensors"))


def check_outside(out: Path, model: Path) -> None:
    """Raise QsunError where OUT is inside the model that is read."""
    if out.resolve().is_relative_to(model.resolve()):
        raise QsunError(f"output directory {out} is inside the input {model}; choose one outside")


def take_lock(path: Path, mode: str, kind: int) -> IO[bytes]:
    """Lock a file until it is closed or its process ends. Raises QsunError where another run has it."""
    file: IO[bytes] = path.open(mode)
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise QsunError(f"another run is writing {path.parent}; wait for it, or choose another --out") from None
    except OSError as error:
        log.debug("%s cannot be locked: %s", path, error)
    return file


def check_free(out: Path, resume: bool, lock: bool = True) -> None:
    """Raise QsunError if OUT exists or cannot be created, if another run writes it, or an interrupted one is there."""
    above = existing_parent(out)
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        fault = "is not writable" if above.is_dir() else "is a file"
        raise QsunError(f"output directory {out} cannot be created: {above} {fault}; choose another place")
    if out.is_symlink() or os.path.ismount(out):  # the module appears by a rename, which cannot replace these
        raise QsunError(f"output directory {out} is a link or a mount point; give one inside it, such as {out}/module")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise QsunError(f"output directory {out} exists; choose another, or delete it first")
    lock_file = partial_path(out) / "lock"
    if lock and lock_file.exists():
        take_lock(lock_file, "rb", fcntl.LOCK_SH).close()
    if partial_path(out).exists() and not resume:
        raise QsunError(f"{partial_path(out)} holds an interrupted run; continue it with --resume, or delete it")
