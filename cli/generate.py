"""`qsun generate`: answer prompts from the command line."""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from qsun.cli.terminal import screen
from qsun.cli.terminal.device import check_device
from qsun.cli.terminal.options import DEVICE, KV_DTYPE
from qsun.errors import QsunError

_EXAMPLES = """Answer prompts: a prefill module reads each, the decode module writes the answer.

Examples:

  qsun generate demo "calc 12+7>"

  qsun generate out/int4 --prefill out/math "calc 12+7>" "calc 30-4>" --max-tokens 8

  cat question.txt | qsun generate out/int4 --prefill out/chat --chat --temperature 0.7 --seed 1

  qsun generate out/int4 --prefill math=out/math --prefill code=out/code --input prompts.jsonl --json > answers.jsonl

A line of the .jsonl file is {"prompt": "text"} or {"messages": [...]}, with "tools" for the chat template, and "model"
where there are several prefill modules; all are decoded in one batch. Answers come in the order of the prompts; a
single one appears as it is written.
"""


@dataclass(frozen=True)
class _AskedPrompt:
    """A prompt, as text or as a row with messages, and tools, for the chat template; its module; its name in errors."""

    given: str | Mapping[str, Any]
    model: str
    where: str


def generate(
    decode: str = typer.Argument(..., help="Decode module, quantized or not: directory, hub id, or 'demo'."),
    prompts: list[str] = typer.Argument(None, help="Prompts. Default: standard input is one prompt."),
    prefill: list[str] = typer.Option(
        [], help="Prefill module, DIR or NAME=DIR; may be repeated. Default: the decode module's own base."
    ),
    file: Path | None = typer.Option(None, "--input", help="Prompts from a .jsonl file; - is standard input."),
    chat: bool = typer.Option(False, "--chat", help="Each prompt is a user's message for the chat template."),
    max_tokens: int = typer.Option(128, help="Longest answer, in tokens."),
    temperature: float = typer.Option(0.0, help="0 always takes the most likely token."),
    top_p: float = typer.Option(1.0, help="Probability mass that sampling keeps."),
    top_k: int = typer.Option(0, help="Number of tokens that sampling keeps; 0 keeps all."),
    seed: int = typer.Option(0, help="Random seed; each prompt draws its own numbers."),
    stop: list[str] = typer.Option([], help="Text that ends an answer and is left out; may be repeated."),
    batch_size: int = typer.Option(64, help="Prompts that are decoded together."),
    kv_dtype: str = KV_DTYPE,
    speculate: int = typer.Option(
        0, help="Tokens that a prompt drafts from its own text and checks in one step; pays where text repeats."
    ),
    device: str | None = DEVICE,
    dtype: str | None = typer.Option(None, help="Of activations: float32, bfloat16 ... Default: the decode module's."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object for each prompt."),
) -> None:
    check_device(device)
    modules = _modules(prefill)
    asked = list(_prompts(prompts or [], file, chat, list(modules)))
    settings = {
        "max_new_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": tuple(stop),
        "batch_size": batch_size,
        "speculate": speculate,
        "kv_dtype": kv_dtype,
        "detokenize": True,
    }
    from qsun.device import default_device
    from qsun.engine.config import GenerateConfig, check_steps

    check_steps(GenerateConfig.of(settings), default_device(device))  # before weights are loaded
    screen.show_warnings()
    pieces = _answers(decode, modules, asked, (device, dtype), settings)
    finishes = _stream(pieces) if len(asked) == 1 and not as_json else _print(pieces, asked, as_json)
    if "error" in finishes:
        raise typer.Exit(1)


generate.__doc__ = _EXAMPLES


def _modules(given: list[str]) -> dict[str, str]:
    """Return directories by name; "" is the decode module's own base."""
    modules: dict[str, str] = {}
    for one in given:
        name, equals, directory = one.partition("=")
        if not equals or one.startswith(("/", ".")) or Path(one).is_dir():  # an equals sign may be part of a path
            name = directory = one
        if not name or not directory:
            raise QsunError(f"--prefill {one!r} is neither DIR nor NAME=DIR")
        if name in modules:
            raise QsunError(f"--prefill names {name!r} twice; give each module its own name")
        modules[name] = directory
    return modules or {"": ""}


def _prompts(texts: list[str], file: Path | None, chat: bool, models: list[str]) -> Iterator[_AskedPrompt]:
    if file is not None and texts:
        raise QsunError("give prompts on the command line or in a file, not both")
    if file is not None:
        yield from _rows(file, chat, models)
        return
    if not texts and sys.stdin.isatty():
        raise QsunError('give a prompt, such as qsun generate demo "calc 12+7>", or --input FILE.jsonl')
    if len(models) > 1:
        raise QsunError('several prefill modules: name one for each prompt by "model" in a file (--input)')
    for number, text in enumerate(texts or [_standard_input()]):
        if any("\udc80" <= character <= "\udcff" for character in text):  # how Python keeps such bytes
            raise QsunError(f"prompt {number} is not valid UTF-8; convert it, for example with iconv")
        yield _AskedPrompt(_as_chat(text) if chat else text, models[0], f"prompt {number}")


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise QsunError(f"standard input is not valid {error.encoding} ({error.reason}); convert it to UTF-8") from None


def _rows(file: Path, chat: bool, models: list[str]) -> Iterator[_AskedPrompt]:
    from qsun.data.jsonl import read_rows, text_of

    for where, row in read_rows(Path("/dev/stdin") if str(file) == "-" else file, "prompt"):
        if ("prompt" in row) == ("messages" in row):
            raise QsunError(f"{where}: give either 'prompt' or 'messages'")
        model = row.get("model", models[0] if len(models) == 1 else None)
        if model not in models:
            raise QsunError(f"{where}: 'model' is {model!r}; use one of {', '.join(models)}")
        if "messages" in row:
            yield _AskedPrompt(row, model, where)
        else:
            text = text_of(row, "prompt", where)
            yield _AskedPrompt({**row, **_as_chat(text)} if chat else text, model, where)


def _as_chat(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


def _answers(
    decode: str,
    modules: dict[str, str],
    asked: list[_AskedPrompt],
    where: tuple[str | None, str | None],
    settings: dict[str, Any],
) -> Iterator[Any]:
    """Load what is needed and yield the pieces of all answers. Everything that can be refused is refused first."""
    from qsun.engine.generation import generate_stream
    from qsun.model.pairing import find_base
    from qsun.runtime.decode_module import load_decode
    from qsun.runtime.prefill_module import load_prefill

    device, dtype = where
    module = load_decode(decode, device, dtype)
    own_dtype = module.model.model.embed_tokens.weight.dtype
    loaded = {
        name: load_prefill(modules[name] or find_base(decode)[1], module, own_dtype)
        for name in {prompt.model: None for prompt in asked}
    }
    prompts = [_encoded(module.tokenizer, prompt) for prompt in asked]
    return generate_stream([loaded[prompt.model] for prompt in asked], module, prompts, **settings)


def _encoded(tokenizer: Any, prompt: _AskedPrompt) -> Any:
    """Return text as it is, and the tokens of a chat, which are those that tuning makes of it, but for the day."""
    if isinstance(prompt.given, str):
        return prompt.given
    from qsun.data.examples import prompt_example

    return prompt_example(tokenizer, prompt.given, prompt.where).prompt


def _stream(pieces: Iterator[Any]) -> set[str]:
    """Write one answer as it comes. Returns why it ended."""
    finishes = set()
    for piece in pieces:
        sys.stdout.write(piece.text)
        sys.stdout.flush()
        finishes.add(piece.finish)
    typer.echo()
    return finishes


def _print(pieces: Iterator[Any], asked: list[_AskedPrompt], as_json: bool) -> set[str]:
    """Print whole answers in the order of their prompts, each once those before it are done. Returns why they ended."""
    texts, tokens, finishes = [""] * len(asked), [0] * len(asked), [""] * len(asked)
    printed = 0
    for piece in pieces:
        texts[piece.prompt] += piece.text
        tokens[piece.prompt] += len(piece.tokens)
        finishes[piece.prompt] = piece.finish
        while printed < len(asked) and finishes[printed]:
            prompt = asked[printed]
            named = {"model": prompt.model} if prompt.model else {}
            answer = named | {"text": texts[printed], "tokens": tokens[printed], "finish": finishes[printed]}
            typer.echo(json.dumps({"index": printed} | answer, ensure_ascii=False) if as_json else texts[printed])
            printed += 1
    return set(finishes)
