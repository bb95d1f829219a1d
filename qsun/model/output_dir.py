"""The unfinished output: finished blocks wait in OUT.partial until the whole module appears at OUT by one rename."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from qsun.errors import QsunError, ResumeError
from qsun.model.checkpoint import read_json
from qsun.model.manifest import write_json


class Workdir:
    """Parts of an output directory in the making.

    Args:
        out: where the module will appear; must not exist.
        settings: everything that decides the bytes; a resumed run must have the same.
    Raises:
        QsunError: OUT exists, or an interrupted run is there and `resume` is false.
        ResumeError: the settings changed.
    """

    def __init__(self, out: Path, settings: dict[str, Any], resume: bool):
        self.out = out.absolute()
        self.root = partial_path(out)
        self.module = self.root / "module"
        check_free(out, resume)
        if self.root.exists():
            self._check_settings(settings)
        (self.root / "parts").mkdir(parents=True, exist_ok=True)
        write_json(self.root / "run.json", settings)

    def _check_settings(self, settings: dict[str, Any]) -> None:
        record = self.root / "run.json"
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
        """The record is written after the tensors, so it vouches for them."""
        return self._record(name).exists()

    def write(self, name: str, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Keep a finished part and its record."""
        draft = self.part(name).with_suffix(".draft")
        save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, draft, {"format": "pt"})
        draft.replace(self.part(name))
        write_json(self._record(name), record)

    def record(self, name: str) -> dict[str, Any]:
        return read_json(self._record(name))

    def names(self, prefix: str) -> list[str]:
        """Finished parts whose names begin like this, sorted."""
        return sorted(path.stem for path in (self.root / "parts").glob(f"{prefix}*.json"))

    def drop(self, name: str) -> None:
        """Forget a part: first its record, which vouches for the tensors."""
        self._record(name).unlink()
        self.part(name).unlink()

    def _record(self, name: str) -> Path:
        return self.root / "parts" / f"{name}.json"

    def fresh_module(self) -> Path:
        """An empty directory for the files of the finished module."""
        shutil.rmtree(self.module, ignore_errors=True)
        self.module.mkdir()
        return self.module

    def publish(self) -> None:
        """Make the module appear at OUT, and drop the parts."""
        self.module.rename(self.out)
        shutil.rmtree(self.root, ignore_errors=True)


def partial_path(out: Path) -> Path:
    out = out.absolute()  # "." has no name
    return out.with_name(out.name + ".partial")


def written_bytes(out: Path) -> int:
    """Of the parts that an interrupted run has finished."""
    return sum(file.stat().st_size for file in (partial_path(out) / "parts").glob("*.safetensors"))


def check_free(out: Path, resume: bool) -> None:
    """Raise QsunError where OUT exists, or an interrupted run that was not asked to be resumed."""
    if out.is_symlink() or os.path.ismount(out):  # the module appears by a rename, which cannot replace these
        raise QsunError(f"output directory {out} is a link or a mount point; give one inside it, such as {out}/module")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise QsunError(f"output directory {out} exists; choose another, or delete it first")
    if partial_path(out).exists() and not resume:
        raise QsunError(f"{partial_path(out)} holds an interrupted run; continue it with --resume, or delete it")
