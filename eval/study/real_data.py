"""Public data sets as rows of prompt and response: the tasks of docs/results/real.

Snips (github.com/sonos/nlu-benchmark, 2017-06-custom-intent-engines, CC0): an utterance becomes a JSON call. Django
(github.com/odashi/ase15-django-dataset, MIT): a line of English becomes a line of Python, its tokens apart. SVAMP
(github.com/arkilpatel/SVAMP, MIT; the ASDiv part of its training rows CC BY-NC 4.0): a word problem becomes a prefix
expression.
"""

import csv
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qsun.errors import QsunError

Row = Mapping[str, str]
_VALID, _TEST, _LONGEST = 500, 1000, 300  # rows; rows of django; characters of a django line
_PROBLEMS_VALID = 300  # rows of svamp


def write_real_tasks(snips: Path, django: Path, out: Path, svamp: Path | None = None) -> dict[str, int]:
    """Write `out`/{snips,django,svamp}-{train,valid,test}.jsonl, always the same rows; return how many each file has.

    Args:
        snips, django, svamp: checkouts of the repositories; None: without this one.
    Raises:
        QsunError: a file of theirs is missing or not what it was.
    """
    rng = random.Random(0)
    folder = snips / "2017-06-custom-intent-engines"
    calls, held_out = _snips(folder, "*/train_*_full.json"), _snips(folder, "*/validate_*.json")
    rng.shuffle(calls)
    rng.shuffle(held_out)
    lines = _django(django / "django")
    rng.shuffle(lines)
    files = {
        "snips-train": calls[:-_VALID],
        "snips-valid": calls[-_VALID:],
        "snips-test": held_out,
        "django-train": lines[: -_VALID - _TEST],
        "django-valid": lines[-_VALID - _TEST : -_TEST],
        "django-test": lines[-_TEST:],
    }
    if svamp is not None:
        problems, asked = (_svamp(svamp / "data/mawps-asdiv-a_svamp" / name) for name in ("train.csv", "dev.csv"))
        rng.shuffle(problems)
        files["svamp-train"], files["svamp-valid"] = problems[:-_PROBLEMS_VALID], problems[-_PROBLEMS_VALID:]
        files["svamp-test"] = asked
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return {name: len(rows) for name, rows in files.items()}


def _snips(folder: Path, pattern: str) -> list[Row]:
    files = sorted(folder.glob(pattern), key=lambda file: file.name)
    if not files:
        raise QsunError(f"{folder} has no {pattern}; give a checkout of github.com/sonos/nlu-benchmark")
    return [row for file in files for row in _calls(file)]


def _calls(file: Path) -> list[Row]:
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:  # two of the files are not UTF-8
        text = raw.decode("latin-1")
    try:
        ((intent, items),) = json.loads(text).items()
        return [_call(intent, item["data"]) for item in items]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise QsunError(f"{file} is not a file of the Snips benchmark: {error!r}") from None


def _call(intent: str, pieces: Sequence[Mapping[str, Any]]) -> Row:
    request = " ".join("".join(piece["text"] for piece in pieces).split())
    arguments: dict[str, str] = {}
    for piece in pieces:
        if "entity" in piece:
            arguments.setdefault(piece["entity"], piece["text"].strip())
    call = json.dumps({"name": intent, "arguments": arguments}, ensure_ascii=False)
    return {"prompt": f"Request: {request}\nCall:", "response": f" {call}"}


def _django(folder: Path) -> list[Row]:
    """Return rows whose prompts all differ."""
    texts = []
    for name in ("all.anno", "all.code"):
        if not (folder / name).is_file():
            raise QsunError(f"{folder / name} is missing; give a checkout of github.com/odashi/ase15-django-dataset")
        texts.append((folder / name).read_text(encoding="utf-8").split("\n")[:-1])
    if len(texts[0]) != len(texts[1]):
        raise QsunError(
            f"{folder}: all.anno has {len(texts[0])} lines and all.code {len(texts[1])}; they must be pairs"
        )
    if min(map(len, texts)) < _VALID + _TEST:
        raise QsunError(f"{folder} has {len(texts[0])} lines; {_VALID + _TEST} are held out, so give all of them")
    found: dict[str, str] = {}
    for english, code in zip(*texts, strict=True):
        if len(english) < _LONGEST and len(code) < _LONGEST:
            found.setdefault(f"# {english.strip()}\n", " ".join(code.split()))
    return [{"prompt": prompt, "response": response} for prompt, response in found.items()]


def _svamp(file: Path) -> list[Row]:
    try:
        with file.open(encoding="utf-8", newline="") as opened:
            found = [(row["Question"], row["Equation"]) for row in csv.DictReader(opened)]
    except (OSError, KeyError) as error:
        raise QsunError(f"{file}: {error!r}; give a checkout of github.com/arkilpatel/SVAMP") from None
    return [{"prompt": f"Problem: {text}\nEquation:", "response": f" {expression}"} for text, expression in found]
