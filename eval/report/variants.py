"""The compared pairs of a prefill module and a decode module, from the command line or from a YAML file.

    variants:
      - {name: base, model: demo}                                  # one model for both
      - {name: full fine-tune, model: out/full/math, tasks: [qsun_math]}
      - {name: SUN, prefill: out/sun/math, decode: demo, tasks: [qsun_math]}
      - {name: QSUN int4, prefill: out/sun/math, decode: out/int4, tasks: [qsun_math]}

Entries with the same name are one variant: if each task has its own prefill module, that one answers it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qsun.errors import QsunError
from qsun.model.checkpoint import read_json
from qsun.model.locate import find_model
from qsun.model.pairing import find_base

_KEYS = {"name", "model", "prefill", "decode", "base", "tasks", "responses"}


@dataclass(frozen=True)
class Entry:
    """A pair and the tasks that it answers.

    Attributes:
        name: of the variant. prefill, decode: directories, hub ids or "demo"; equal for a model that does both.
        tasks: lm-eval tasks; empty: all tasks of the evaluation.
        responses: .jsonl of prompts and responses, for the divergence at decode positions; may be empty.
        base: full-precision base of the decode module; empty: the one that it names.
    """

    name: str
    prefill: str
    decode: str
    tasks: tuple[str, ...] = ()
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
        return [task for task in tasks if not self.tasks or task in self.tasks]


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


def from_file(path: Path, tasks: Sequence[str] = ()) -> Matrix:
    """Read a matrix whose directories are relative to the file; `tasks` replaces those of the file.

    Raises:
        QsunError: not YAML, an unknown key, or an entry without a model or a pair.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise QsunError(f"{path}: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(values, Mapping) or not isinstance(values.get("variants"), list) or not values["variants"]:
        raise QsunError(f"{path} has no list of variants; write `variants: [{{name: base, model: demo}}, ...]`")
    entries = tuple(_entry(row, path) for row in values["variants"])
    wanted = (
        tuple(tasks)
        or _names(values.get("tasks"), str(path))
        or tuple(dict.fromkeys(t for e in entries for t in e.tasks))
    )
    unasked = [task for entry in entries for task in entry.tasks if not tasks and task not in wanted]
    if unasked:
        raise QsunError(f"{path}: a variant has the task {unasked[0]!r}, which `tasks` does not list; add it there")
    names = [entry.name for entry in entries]
    reference = str(values.get("reference") or ("SUN" if "SUN" in names else names[0]))
    if reference not in names:
        raise QsunError(
            f"{path}: the reference {reference!r} is not a variant; use one of {', '.join(dict.fromkeys(names))}"
        )
    return Matrix(entries, wanted, reference)


def _entry(row: Any, path: Path) -> Entry:
    if not isinstance(row, Mapping) or not row.get("name"):
        raise QsunError(f"{path}: {row!r} is not a variant; give it a name and a model, or prefill and decode")
    unknown = sorted(set(row) - _KEYS)
    if unknown:
        raise QsunError(f"{path}: variant {row['name']!r} has {unknown[0]!r}; known are {', '.join(sorted(_KEYS))}")
    for key in ("name", "model", "prefill", "decode", "base", "responses"):
        if not isinstance(row.get(key, ""), str):
            raise QsunError(f"{path}: variant {row['name']!r}: {key} is {row[key]!r}; write a string")
    model = row.get("model")
    prefill, decode = row.get("prefill") or model, row.get("decode") or model
    if not prefill or not decode:
        raise QsunError(f"{path}: variant {row['name']!r} needs a model, or a prefill and a decode module")
    responses = row.get("responses")
    if responses and not (path.parent / responses).is_file():
        raise QsunError(f"{path}: variant {row['name']!r}: responses {responses} is not a file beside it")
    return Entry(
        str(row["name"]),
        _place(prefill, path),
        _place(decode, path),
        _names(row.get("tasks"), f"{path}: variant {row['name']!r}"),
        str(path.parent / responses) if responses else "",
        _place(row["base"], path) if row.get("base") else "",
    )


def _names(value: Any, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(task, str) for task in value):
        raise QsunError(f"{where}: tasks is {value!r}; write a list, such as [qsun_math, qsun_code]")
    return tuple(value)


def _place(name: str, path: Path) -> str:
    """Return a directory beside the file if it exists, else the name for find_model."""
    beside = path.parent / name
    return str(beside) if beside.is_dir() else str(name)


def stored_bits(directory: str) -> int:
    """Return the bits of a quantized module's linear layers from its config.json; 0 for full precision."""
    config = read_json(find_model(directory) / "config.json").get("quantization_config")
    if not config:
        return 0
    groups: list[Any] = [*(config.get("config_groups") or {}).values()]
    return int(config.get("bits") or (groups[0]["weights"]["num_bits"] if groups else 0))
