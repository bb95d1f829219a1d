"""`qsun serve`: many prefill modules, one decode module, one process."""

import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import typer

from qsun.cli.terminal import screen
from qsun.cli.terminal.device import check_device
from qsun.cli.terminal.options import DEVICE, KV_DTYPE
from qsun.errors import QsunError

_EXAMPLES = """Serve many prefill modules from one decode module through OpenAI's API, in one process.

Examples:

  qsun serve --decode demo

  qsun serve --decode out/int4 --prefill math=out/math --prefill code=out/code --port 8000

  qsun serve --decode out/int4 --adapters out/adapters --max-adapters 64

  curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"model": "math", "prompt": "calc 12+8>"}'

Each prefill module is a model of the API. --adapters serves every LoRA adapter in a folder under the name of its own
folder: all share one set of prefill weights, and each adds only its own megabytes, while it is in use. Without
--prefill, and with --adapters, the base itself is a model, "base"; if all adapters were tuned on the decode module's
weights, these read its prompts too. SIGTERM and Ctrl-C let running requests finish; a second one ends them.
/metrics is for Prometheus, /health and /ready are for probes. Without --api-keys the server listens on this machine
only.
"""


def serve(
    decode: str = typer.Option(..., help="Decode module, quantized or not: directory, hub id, or 'demo'."),
    prefill: list[str] = typer.Option(
        [], help="NAME=DIR of a prefill module; may be repeated. An adapter is merged into weights of its own."
    ),
    adapters: Path | None = typer.Option(None, help="Folder of LoRA adapters; the name of each subfolder is a model."),
    max_adapters: int = typer.Option(32, min=1, help="Adapters in memory; the least recently used is evicted first."),
    host: str = typer.Option("127.0.0.1", help="Address to listen on."),
    port: int = typer.Option(8000, min=0, max=65535, help="Port; 0 takes a free one."),
    api_keys: Path | None = typer.Option(None, help="File with an API key on each line; # begins a comment."),
    cors_origin: list[str] = typer.Option([], help="Web origin that may call the API, or '*'; may be repeated."),
    tool_format: str = typer.Option(
        "", help="How the model calls tools: hermes, mistral or llama3. Default: its chat template's."
    ),
    max_batch: int = typer.Option(64, min=1, help="Requests that prefill or decode at a time."),
    kv_memory: str = typer.Option("auto", help="Memory for KV, such as 2GiB. Default: a quarter of what is free."),
    kv_dtype: str = KV_DTYPE,
    prefix_cache: str = typer.Option("256MiB", help="Memory for KV of prompt prefixes; 0: none."),
    prefill_tokens: int = typer.Option(512, min=1, help="Prompt tokens read between two decode steps."),
    speculate: int = typer.Option(
        0, min=0, help="Tokens that a row drafts from its own text and checks in one step; pays where text repeats."
    ),
    max_waiting: int = typer.Option(256, min=1, help="Requests that may queue; more get 429."),
    max_tokens: int = typer.Option(0, min=0, help="Longest answer. Default: what the model has positions for."),
    default_tokens: int = typer.Option(
        1024, min=0, help="Longest answer of a chat that sets no max_tokens; 0: all positions. KV is reserved for it."
    ),
    timeout: float = typer.Option(600.0, help="Time limit of a request, in seconds."),
    max_body: str = typer.Option("1MiB", help="Longest body of a request."),
    drain: float = typer.Option(30.0, min=1, help="Seconds for running requests to finish on shutdown."),
    dtype: str | None = typer.Option(None, help="Of activations: float32, bfloat16 ... Default: the decode module's."),
    device: str | None = DEVICE,
    threads: int = typer.Option(0, min=0, help="CPU threads. Default: as torch chooses, one for each core."),
    admin: bool = typer.Option(False, "--admin", help="Add and remove modules by POST and DELETE /admin/models."),
    partitioned: bool = typer.Option(
        False, "--partitioned", help="Decode each model in batches of its own, to compare."
    ),
    as_json: bool = typer.Option(False, "--json", help="When ready, print one JSON object on stdout."),
) -> None:
    import asyncio

    check_device(device)
    named = _named(prefill)
    folders = _adapters(adapters, named)
    from qsun.engine.config import EngineConfig
    from qsun.serve.api.completions import ServeLimits
    from qsun.serve.http.cors import with_cors
    from qsun.serve.http.guard import Guard, GuardConfig
    from qsun.serve.http.keys import check_exposed, read_keys
    from qsun.serve.http.server import Draining, HttpProcess, listen

    keys = read_keys(api_keys)
    check_exposed(host, bool(keys))
    guard = GuardConfig(api_keys=keys, max_body_bytes=byte_count("max-body", max_body), host=host)
    asked: Any = {"seconds": timeout, "tool_format": tool_format}
    limits = ServeLimits(max_tokens=max_tokens, default_tokens=default_tokens, **asked)
    kv_bytes = 0 if kv_memory == "auto" else byte_count("kv-memory", kv_memory)
    kv: Any = {"kv_bytes": kv_bytes, "kv_dtype": kv_dtype}  # EngineConfig refuses other names
    config = EngineConfig(
        max_batch=max_batch,
        **kv,
        prefix_bytes=byte_count("prefix-cache", prefix_cache),
        prefill_tokens=prefill_tokens,
        max_waiting=max_waiting,
        max_adapters=max_adapters,
        speculate=speculate,
        partitioned=partitioned,
    )
    screen.show_warnings()
    logging.getLogger("uvicorn").addHandler(logging.StreamHandler(sys.stderr))
    with listen(host, port) as bound:  # before weights are loaded: a taken port is known at once
        serving, app = _load(decode, (named, folders), config, limits, (dtype, device, threads), admin)
        guarded = Guard(app, guard)
        draining = Draining(serving.drain, lambda: guarded.running, lambda: drain, lambda: serving.thread.stop(0))
        try:
            process = HttpProcess(with_cors(guarded, cors_origin), bound, draining)
            asyncio.run(process.serve(lambda url: _announce(url, serving, as_json)))
        finally:
            serving.thread.stop()  # a second signal leaves it running, and a thread inside torch aborts the process


serve.__doc__ = _EXAMPLES


def _load(
    decode: str,
    named: tuple[dict[str, str], dict[str, Path]],
    config: Any,
    limits: Any,
    where: tuple[str | None, str | None, int],
    admin: bool,
) -> tuple[Any, Any]:
    """Load all modules; named: full ones and adapters. Returns the server's state and its application."""
    dtype, device, threads = where
    import torch

    from qsun.adapters.adapter_module import AdapterLibrary
    from qsun.device import default_device
    from qsun.engine.config import check_steps
    from qsun.engine.engine import Engine
    from qsun.runtime.decode_module import load_decode
    from qsun.serve.api.app import Serving, build_app
    from qsun.serve.api.metrics import Metrics

    check_steps(config, default_device(device))
    if threads:
        torch.set_num_threads(threads)
    with screen.progress(quiet=False) as progress:
        progress(f"decode module {decode}", 0, 1)
        module = load_decode(decode, device, dtype)
        library, metrics = AdapterLibrary(module), Metrics()
        modules = _modules(module, library, *named, progress)
        engine = Engine(module, config, metrics)  # after the modules: KV is a share of what they leave free
        for name, prefill in modules.items():
            engine.add_module(name, prefill)
    serving = Serving(engine, metrics, limits, library)
    return serving, build_app(serving, admin)


def _modules(decode: Any, library: Any, full: dict[str, str], adapters: dict[str, Path], progress: Any) -> Any:
    """Load full modules and check adapters. Returns them by name, and the base where it is served too."""
    from qsun.model.pairing import find_base
    from qsun.runtime.prefill_module import load_prefill

    names: dict[str, Any] = {**full, **adapters} or {"base": find_base(decode.directory)[1]}
    modules = {}
    for number, (name, directory) in enumerate(names.items(), 1):
        progress(f"prefill module {name}", number, len(names) + 1)
        if name in adapters:
            modules[name] = library.open(directory)
        else:
            modules[name] = load_prefill(directory, decode, decode.model.model.embed_tokens.weight.dtype)
    if adapters:
        modules.setdefault("base", library.plain())
    progress("loaded", len(names) + 1, len(names) + 1)
    return modules


def _announce(url: str, serving: Any, as_json: bool) -> None:
    models = list(serving.engine.modules)
    if as_json:
        typer.echo(json.dumps({"url": url, "models": models, "kv_budget_tokens": serving.engine.budget_tokens}))
    sys.stdout.flush()
    screen.note(f"serving {', '.join(models)} on {url} (KV for {serving.engine.budget_tokens:,} tokens)")


def _named(pairs: list[str]) -> dict[str, str]:
    from qsun.serve.api.admin import MODEL_NAME

    named: dict[str, str] = {}
    for pair in pairs:
        name, equals, directory = pair.partition("=")
        if not equals or not directory or not re.fullmatch(MODEL_NAME, name):
            raise QsunError(f"--prefill {pair!r} is not NAME=DIR; use letters, digits and . _ / : - in the name")
        if name in named:
            raise QsunError(f"--prefill names {name!r} twice; give each model a name of its own")
        named[name] = directory
    return named


def _adapters(folder: Path | None, named: dict[str, str]) -> dict[str, Path]:
    """Return the adapters in a folder by name."""
    if folder is None:
        return {}
    from qsun.adapters.adapter_module import adapter_directories
    from qsun.serve.api.admin import MODEL_NAME

    found = adapter_directories(folder)
    for name, path in found.items():
        if not re.fullmatch(MODEL_NAME, name):
            raise QsunError(f"{path} cannot be the name of a model; use letters, digits and . _ : - in it")
        if name in named:
            raise QsunError(f"--prefill names {name!r}, and {path} is an adapter of that name; rename one")
    return found


def byte_count(name: str, text: str) -> int:
    """Bytes of "512MiB", "2GB" or "1000". Raises QsunError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip())
    if not found:
        raise QsunError(f"--{name} {text!r} is not a size; use one such as 512MiB, 2GB or 0")
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(prefix) + 1 if prefix else 0))
