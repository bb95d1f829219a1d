"""The pretraining mixture of the demo base: seeded generators of short documents, in pure Python.

A model of 0.8 M parameters cannot learn the web, but it can learn a few skills well. The mixture has the skills that
the tasks of later fine-tuning need (word problems, code, tool calls), but not the tasks themselves: arithmetic, string
operations, key lookup, JSON rendering and some English. Fine-tuning then has real skills to build on, and quantization
real skills to damage.

A document is a prompt and a response. `render` writes it as one string with its special tokens; a text is such strings,
one after the other, with nothing between them:

    <s>calc 12+8>20</s><s>rev cat>tac</s><s>get b a=x b=7:05>7:05</s>
    <s>json play song=abc>{"name":"play","args":{"song":"abc"}}</s>

A prompt ends with ">"; natural text has an empty prompt. One synthetic document in four has filler words around its
instruction, so that the model learns to look for the instruction instead of counting characters.

An eighth of all sums and words is held out, chosen by a checksum of their text and never by a seed: every task built on
`arithmetic_pair` and `random_word` has the same split as the base, and nothing can leak.
"""

import json
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from pydoc_data.topics import topics
from random import Random

LETTERS = "abcdefghijklmnopqrstuvwxyz"
_FILLER_TEXT = (
    "the of and to in is it on as with for at by from this that be are was now then so very please ok "
    "well here there some any big red blue old new day way man time year work hand part place case week "
    "point home room area money story fact month lot right book eye job word side kind head house friend "
    "hour game line end law car city"
)
FILLERS = tuple(_FILLER_TEXT.split())
LARGEST_OPERAND = 49
HELD_OUT_ONE_IN = 8
PASSAGE_CHARACTERS = 100

NATURAL_SHARE = 0.03
FILLER_SHARE = 0.25

STRING_OPERATIONS: dict[str, Callable[[str], str]] = {
    "rev": lambda word: word[::-1],
    "up": str.upper,
    "sort": lambda word: "".join(sorted(word)),
    "dup": lambda word: word * 2,
    "cap": str.capitalize,
    "tail": lambda word: word[1:],
}


def is_held_out(key: str) -> bool:
    """Return whether a sum ("12+8") or a word ("cat") is kept out of every training document."""
    return zlib.crc32(key.encode()) % HELD_OUT_ONE_IN == 0


def arithmetic_pair(rng: Random, *, held_out: bool = False, operator: str | None = None) -> tuple[int, int, str]:
    """Draw (a, b, operator) from one side of the split; a difference is never negative."""
    while True:
        chosen = operator or rng.choice("+-")
        a, b = rng.randint(1, LARGEST_OPERAND), rng.randint(1, LARGEST_OPERAND)
        if chosen == "-" and a < b:
            a, b = b, a
        if is_held_out(f"{a}{chosen}{b}") == held_out:
            return a, b, chosen


def random_word(rng: Random, *, held_out: bool = False, shortest: int = 3, longest: int = 5) -> str:
    """Draw a word of random lower-case letters from one side of the split."""
    while True:
        word = "".join(rng.choice(LETTERS) for _ in range(rng.randint(shortest, longest)))
        if is_held_out(word) == held_out:
            return word


def render_call(name: str, arguments: Mapping[str, str]) -> str:
    """Write a tool call as compact JSON; the arguments keep their order."""
    return json.dumps({"name": name, "args": dict(arguments)}, separators=(",", ":"))


def arithmetic(rng: Random, *, held_out: bool = False) -> tuple[str, str]:
    """Draw a sum or a difference: ("calc 12+8", "20")."""
    a, b, operator = arithmetic_pair(rng, held_out=held_out)
    return f"calc {a}{operator}{b}", str(a + b if operator == "+" else a - b)


def string_operation(rng: Random, *, held_out: bool = False) -> tuple[str, str]:
    """Draw one of STRING_OPERATIONS on a word: ("rev cat", "tac")."""
    operation = rng.choice(list(STRING_OPERATIONS))
    word = random_word(rng, held_out=held_out)
    return f"{operation} {word}", STRING_OPERATIONS[operation](word)


def key_lookup(rng: Random, *, held_out: bool = False) -> tuple[str, str]:
    """Draw a lookup of one of three keys: ("get b a=x b=7:05 c=to", "7:05")."""
    pairs = {key: _value(rng, held_out) for key in rng.sample(LETTERS, 3)}
    wanted = rng.choice(list(pairs))
    return f"get {wanted} {_assignments(pairs)}", pairs[wanted]


def json_rendering(rng: Random, *, held_out: bool = False) -> tuple[str, str]:
    """Draw a call with one or two arguments: ("json play song=abc", '{"name":"play","args":{"song":"abc"}}')."""
    name = random_word(rng, held_out=held_out, longest=6)
    arguments: dict[str, str] = {}
    wanted = rng.randint(1, 2)
    while len(arguments) < wanted:
        key = random_word(rng, held_out=held_out, shortest=2)
        arguments[key] = _value(rng, held_out)
    return f"json {name} {_assignments(arguments)}", render_call(name, arguments)


# Shares of the synthetic documents. Measured at 2,400 steps: moving a tenth from arithmetic to lookup lowered held-out
# sums from 0.998 to 0.732 and raised lookup only from 0.134 to 0.220.
FAMILIES: dict[str, tuple[Callable[..., tuple[str, str]], float]] = {
    "arithmetic": (arithmetic, 0.45),
    "string": (string_operation, 0.32),
    "lookup": (key_lookup, 0.05),
    "json": (json_rendering, 0.18),
}


def family_document(rng: Random, family: str, *, held_out: bool = False) -> tuple[str, str]:
    """Draw one (prompt, response) of a family, a quarter of them among filler words."""
    instruction, response = FAMILIES[family][0](rng, held_out=held_out)
    if rng.random() < FILLER_SHARE:
        instruction = " ".join([*_fillers(rng), instruction, *_fillers(rng)])
    return instruction + ">", response


def natural_passage(rng: Random) -> str:
    """Cut about PASSAGE_CHARACTERS of English from the Python documentation, from a line's start to a word's end."""
    text, starts = _documentation()
    start = rng.choice(starts)
    passage = text[start : start + PASSAGE_CHARACTERS]
    return passage[: passage.rfind(" ")] if " " in passage.strip() else passage


def document(rng: Random) -> tuple[str, str]:
    """Draw one (prompt, response) of the whole mixture; the prompt of natural text is empty."""
    if rng.random() < NATURAL_SHARE:
        return "", natural_passage(rng)
    shares = [share for _, share in FAMILIES.values()]
    return family_document(rng, rng.choices(list(FAMILIES), weights=shares)[0])


def render(prompt: str, response: str) -> str:
    """Write a document as text whose special tokens the demo tokenizer parses."""
    return f"<s>{prompt}{response}</s>"


def calibration_text(seed: int, *, size_bytes: int = 32768) -> str:
    """Concatenate whole documents up to `size_bytes` of ASCII text."""
    rng = Random(seed)
    documents: list[str] = []
    length = 0
    while True:
        rendered = render(*document(rng))
        length += len(rendered)
        if length > size_bytes:
            return "".join(documents)
        documents.append(rendered)


def _value(rng: Random, held_out: bool) -> str:
    kind = rng.random()
    if kind < 0.4:
        return random_word(rng, held_out=held_out, shortest=2)
    if kind < 0.6:
        return str(rng.randint(1, 99))
    if kind < 0.8:
        return f"{rng.randint(1, 12)}:{rng.randint(0, 59):02d}"
    return rng.choice(FILLERS)


def _assignments(pairs: Mapping[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in pairs.items())


def _fillers(rng: Random) -> list[str]:
    return [rng.choice(FILLERS) for _ in range(rng.randint(0, 3))]


@cache
def _documentation() -> tuple[str, list[int]]:
    """Return the language reference, which every interpreter includes, and where its lines of prose start."""
    text = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "replace").decode()
    last = len(text) - PASSAGE_CHARACTERS
    starts = [i + 1 for i in range(last) if text[i] == "\n" and text[i + 1] not in "\n*=-~"]
    return text, starts
