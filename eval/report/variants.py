"""The compared pairs of a prefill module and a decode module, from the command line or from a YAML file.

    variants:
      - {name: base, model: demo}                                  # one model for both
      - {name: full fine-tune, model: out/full/math, tasks: [qsun_math]}
      - {name: SUN, prefill: out/sun/math, decode: demo, tasks: [qsun_math]}
      - {name: QSUN int4, prefill: out/sun/math, decode: out/int4, tasks: [qsun_math]}

Entries with the same name are one variant: if each task has its own prefill module, that one answers it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from qsun.config import Section, Settings, read_config_file
from qsun.errors import QsunError
from qsun.model.checkpoint import read_json
from qsun.model.locate import find_model
from qsun.model.manifest import read_manifest
from qsun.model.pairing import find_base


@dataclass(frozen=True)
class Entry:
    """A pair and the tasks that it answers.

    Attributes:
        name: of the variant. prefill, decode: directories, hub ids or "demo"; equal for a model that does both.
        tasks: lm-eval tasks, may be empty; None: all tasks of the evaluation.
        responses: .jsonl of prompts and responses, for the divergence at decode positions; may be empty.
        base: full-precision base of the decode module; empty: the one that it names.
    """

    name: str
    prefill: str
    decode: str
    tasks: tuple[str, ...] | None = None
    responses: str = ""
    base: str = ""

    def full_precision(self) -> tuple[Path, str]:
        """Return directory and name of the decode module's base. Raises QsunError if there is none."""
        return find_base(self.decode, self.base or None)

    @property
    def alone(self) -> bool:
        """Whether one model does both: a base, or a fine-tune that decodes for itself."""
        return self.prefill == self.decode

    def answers(self, tasks: Sequence[str]) -> list[str]:
        """Return those of the tasks that this pair answers."""
        return [task for task in tasks if self.tasks is None or task in self.tasks]


@dataclass(frozen=True)
class Matrix:
    """All entries, the tasks, and the name of the variant to compare the others with."""

    entries: tuple[Entry, ...]
    tasks: tuple[str, ...]
    reference: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(dict.fromkeys(self.tasks)))
        pairs = [(entry.name, task) for entry in self.entries for task in entry.answers(self.tasks)]
        for name, task in pairs:
            if pairs.count((name, task)) > 1:
                raise QsunError(f"two entries named {name!r} answer {task}; give them different names or tasks")

    def names(self) -> list[str]:
        """Return the variants in the order of their first entries."""
        return list(dict.fromkeys(entry.name for entry in self.entries))


def from_options(
    decode: str, prefill: str | None, full: str | None, tasks: Sequence[str], base: str | None = None
) -> Matrix:
    """Return base, full fine-tune, SUN and QSUN, as far as the modules given make them.

    Raises:
        QsunError: a quantized decode module does not name its base.
    """
    (_, found), bits = find_base(decode, base), stored_bits(decode)
    entries = [Entry("base", found, found)]
    if full:
        entries.append(Entry("full fine-tune", full, full))
    if prefill:
        entries.append(Entry("SUN", prefill, found))
    if bits:
        name = f"int{bits}"
        title = f"QSUN {name}" if prefill else f"base {name}"
        entries.append(Entry(title, prefill or found, decode, base=base or ""))
    return Matrix(tuple(entries), tuple(tasks), "SUN" if prefill else "base")


class _Variant(Section):
    name: Annotated[str, Field(min_length=1)]
    model: str = ""
    prefill: str = ""
    decode: str = ""
    base: str = ""
    tasks: list[str] | None = None
    responses: str = ""

    def entry(self, folder: Path) -> Entry:
        prefill, decode = self.prefill or self.model, self.decode or self.model
        if not prefill or not decode:
            raise QsunError(f"variant {self.name!r} needs a model, or a prefill and a decode module")
        responses = str(folder / self.responses) if self.responses else ""
        if responses and not Path(responses).is_file():
            raise QsunError(f"variant {self.name!r}: responses {self.responses} is not a file beside it")
        prefill, decode, base = (_place(name, folder) for name in (prefill, decode, self.base))
        tasks = None if self.tasks is None else tuple(self.tasks)
        return Entry(self.name, prefill, decode, tasks, responses, base)


class _MatrixFile(Settings):
    variants: Annotated[list[_Variant], Field(min_length=1)]
    tasks: list[str] = Field(default_factory=list)
    reference: str = ""

    def matrix(self, folder: Path, tasks: Sequence[str]) -> Matrix:
        entries = tuple(variant.entry(folder) for variant in self.variants)
        named = [task for entry in entries for task in entry.tasks or ()]
        wanted = tuple(tasks or self.tasks or named)
        unasked = [task for task in named if not tasks and task not in wanted]
        if unasked:
            raise QsunError(f"a variant has the task {unasked[0]!r}, which `tasks` does not list; add it there")
        names = list(dict.fromkeys(entry.name for entry in entries))
        reference = self.reference or ("SUN" if "SUN" in names else names[0])
        if reference not in names:
            raise QsunError(f"the reference {reference!r} is not a variant; use one of {', '.join(names)}")
        return Matrix(entries, wanted, reference)


def from_file(path: Path, tasks: Sequence[str] = ()) -> Matrix:
    """Read a matrix whose directories are relative to the file; `tasks` replaces those of the file.

    Raises:
        QsunError: not YAML, an unknown key, or an entry without a model or a pair.
    """
    values = read_config_file(path, "matrix file")
    try:
        return _MatrixFile.from_dict(values).matrix(path.parent, tasks)
    except QsunError as error:
        raise QsunError(f"matrix file {path}: {error}") from None


def _place(name: str, folder: Path) -> str:
    """Return a directory in the folder if it exists, else the name for find_model."""
    return str(folder / name) if name and (folder / name).is_dir() else name


def stored_bits(directory: str) -> int:
    """Return the bits of a quantized module's linear layers, overrides aside; 0 for full precision."""
    path = find_model(directory)
    config = read_json(path / "config.json").get("quantization_config")
    if not config:
        return 0
    groups: list[Any] = [*(config.get("config_groups") or {}).values()]  # the first may be an override's
    own = read_manifest(path).get("config", {}).get("bits")
    return int(own or config.get("bits") or (groups[0]["weights"]["num_bits"] if groups else 0))
