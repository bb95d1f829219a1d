"""Three small tasks to fine-tune the demo base to: word problems, code and tool calls; seeded, in pure Python.

    math   Ann has 12 eggs and gets 8 more. How many eggs?>     calc 12+8>20
    code   s = 'cat'\\nprint(s[::-1])>                           tac
    tool   play abc of defg>                                    {"name":"play","args":{"title":"abc","artist":"defg"}}

The base has the skills (it adds, reverses and renders JSON when asked in its own notation) but not the tasks: it does
not know what these prompts ask for, which is the usual situation of fine-tuning. Word problems are answered with their
sum written out, in the base's own notation, because the base adds only numbers that stand side by side. Exact match on
200 validation problems, batches of 32: with the number alone as the answer it was 0.09 after 400 steps of full
fine-tuning, with the sum written out 0.99 after 300.

Two more tasks are not served but show where a frozen decoder breaks: it would have to write what it never wrote.

    equation   Ann has 12 eggs and gets 8 more. How many eggs?>     12+8=20
    shift      write each letter's next: cat>                       dbu

An example belongs to the split of its sum, or of each of its words: training data never has those of validation and
test, and these two share none. The corpus keeps the same sums and words from the base (`corpus.is_held_out`), so a
right answer in the test set was computed, not remembered.
"""

import json
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from qsun.demo.corpus import HELD_OUT_ONE_IN, STRING_OPERATIONS, arithmetic_pair, is_held_out, random_word, render_call
from qsun.errors import QsunError

SPLITS = ("train", "valid", "test")
_TRIES = 50  # draws for each example before a split counts as exhausted

_NAMES = ("Ann", "Ben", "Eva", "Kim", "Leo", "Mia", "Tim", "Zoe")
_THINGS = ("eggs", "pens", "cups", "nuts", "keys", "hats")
_SUMS = (
    "{name} has {a} {thing} and gets {b} more. How many {thing}?",
    "{name} has {a} {thing}, {other} has {b}. How many together?",
    "{a} {thing} are in a box and {b} in a bag. Total?",
    "There were {a} {thing}, then {b} came. How many now?",
)
_DIFFERENCES = (
    "{name} has {a} {thing} and drops {b}. How many are left?",
    "{name} had {a} {thing} and gave {other} {b}. How many now?",
    "{name} needs {a} {thing} and has {b}. How many more?",
    "Of {a} {thing}, {b} are gone. What remains?",
)

_EXPRESSIONS = {
    "rev": "{s}[::-1]",
    "up": "{s}.upper()",
    "sort": "''.join(sorted({s}))",
    "dup": "{s} * 2",
    "cap": "{s}.capitalize()",
    "tail": "{s}[1:]",
}

_TOOLS: dict[str, tuple[str, ...]] = {
    "event": ("put {title} in my calendar at {time}", "I have {title} at {time}"),
    "weather": ("how warm is it in {place}?", "does it snow in {place} today?"),
    "mail": ("mail {to} that {text}", "let {to} know: {text}"),
    "play": ("play {title} of {artist}", "I like to hear {title} by {artist}"),
    "buy": ("get me {count} {item}", "put {count} {item} into the cart"),
    "translate": ("what is {word} in {language}?", "say {word} in {language}"),
}
_LANGUAGES = ("french", "latin", "dutch", "greek")


@dataclass(frozen=True)
class TaskExample:
    """A prompt, which ends like the base's own prompts, and its only right response."""

    prompt: str
    response: str


def split_of(key: str) -> str:
    """Return the split that a sum ("12+8") or a word ("cat") belongs to."""
    if not is_held_out(key):
        return "train"
    return SPLITS[1 + zlib.crc32(key.encode()) // HELD_OUT_ONE_IN % 2]


def math_example(rng: Random, split: str) -> TaskExample:
    """Draw a word problem with one sum or difference, which the response writes out."""
    while True:
        a, b, operator = arithmetic_pair(rng, held_out=split != "train")
        if split_of(f"{a}{operator}{b}") == split:
            break
    name, other = rng.sample(_NAMES, 2)
    text = rng.choice(_SUMS if operator == "+" else _DIFFERENCES)
    prompt = text.format(a=a, b=b, name=name, other=other, thing=rng.choice(_THINGS))
    return TaskExample(prompt + ">", f"calc {a}{operator}{b}>{a + b if operator == '+' else a - b}")


def equation_example(rng: Random, split: str) -> TaskExample:
    """Draw the same problem, answered in a notation that the base never saw: "12+8=20"."""
    example = math_example(rng, split)
    return TaskExample(example.prompt, example.response.removeprefix("calc ").replace(">", "="))


def shift_example(rng: Random, split: str) -> TaskExample:
    """Draw a word whose letters are each replaced by the next one, which the base cannot do."""
    word = _word(rng, split)
    return TaskExample(f"write each letter's next: {word}>", "".join(chr((ord(c) - 96) % 26 + 97) for c in word))


def code_example(rng: Random, split: str) -> TaskExample:
    """Draw a program of one or two lines, and what it prints."""
    operation, word = rng.choice(list(_EXPRESSIONS)), _word(rng, split)
    if rng.random() < 0.5:
        program = f"s = {word!r}\nprint({_EXPRESSIONS[operation].format(s='s')})"
    else:
        program = f"print({_EXPRESSIONS[operation].format(s=repr(word))})"
    return TaskExample(program + ">", STRING_OPERATIONS[operation](word))


def tool_example(rng: Random, split: str) -> TaskExample:
    """Draw a request and the tool call that fulfils it. Every tool takes a word, so that every example has a split."""
    tool = rng.choice(list(_TOOLS))
    text = rng.choice(_TOOLS[tool])
    names = [part.partition("}")[0] for part in _TOOLS[tool][0].split("{")[1:]]
    arguments = {name: _argument(rng, name, split) for name in names}
    return TaskExample(text.format(**arguments) + ">", render_call(tool, arguments))


GENERATORS: dict[str, Callable[[Random, str], TaskExample]] = {
    "math": math_example,
    "code": code_example,
    "tool": tool_example,
    "equation": equation_example,
    "shift": shift_example,
}
TASKS = ("math", "code", "tool")
HARD_TASKS = ("equation", "shift")


def examples(task: str, split: str, count: int, seed: int = 0) -> list[TaskExample]:
    """Draw `count` examples with distinct prompts; the same arguments give the same list.

    Args:
        task: one of TASKS or HARD_TASKS.
        split: train, valid or test.
    Raises:
        QsunError: another name, or more examples than there are.
    """
    if task not in GENERATORS:
        raise QsunError(f"task {task!r} is not known; use {', '.join(GENERATORS)}")
    if split not in SPLITS:
        raise QsunError(f"split {split!r} is not known; use {', '.join(SPLITS)}")
    rng = Random(f"{task} {split} {seed}")
    drawn: dict[str, TaskExample] = {}
    for _ in range(_TRIES * count):
        if len(drawn) == count:
            break
        example = GENERATORS[task](rng, split)
        drawn.setdefault(example.prompt, example)
    if len(drawn) < count:
        raise QsunError(f"task {task} has fewer than {count} different {split} examples; ask for {len(drawn)}")
    return list(drawn.values())


def check(task: str, example: TaskExample, answer: str) -> bool:
    """Return whether an answer is right: its number after the last ">" or "=", its text, or its call as JSON."""
    if task in ("math", "equation"):
        return _number(answer) == _number(example.response)
    if task == "tool":
        return json_equal(answer, example.response)
    return answer == example.response


def json_equal(answer: str, response: str) -> bool:
    """Return whether two texts are the same JSON value: keys in any order, 1 equals 1.0, and true is not 1."""
    try:
        return _same(json.loads(answer), json.loads(response))
    except (ValueError, RecursionError):
        return False


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(value, b[key]) for key, value in a.items())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def write_jsonl(path: Path, rows: Iterable[TaskExample]) -> None:
    """Write one {"prompt", "response"} per line, as `qsun tune --data` and `qsun quantize --calib` read them."""
    lines = [json.dumps({"prompt": row.prompt, "response": row.response}) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def _number(answer: str) -> str:
    return re.split("[>=]", answer)[-1].strip()


def _word(rng: Random, split: str) -> str:
    while True:
        word = random_word(rng, held_out=split != "train")
        if split_of(word) == split:
            return word


def _argument(rng: Random, name: str, split: str) -> str:
    if name == "time":
        return f"{rng.randint(1, 12)}:{rng.randint(0, 59):02d}"
    if name == "count":
        return str(rng.randint(2, 99))
    return rng.choice(_LANGUAGES) if name == "language" else _word(rng, split)
