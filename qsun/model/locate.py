"""Find model directories: a path, the packaged `demo`, or a model id on the Hub; and read their tokenizers."""

import json
import logging
import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qsun.demo import base_directory
from qsun.errors import QsunError, shortened
from qsun.model.checkpoint import read_json

DEMO = "demo"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WANTED = ("*.safetensors", "*.json", "tokenizer*", "*.model", "merges.txt", "vocab.*", "chat_template*", "LICENSE*")
_SETTINGS = ("bos_token", "eos_token", "unk_token", "add_bos_token", "add_eos_token", "add_prefix_space")
_UNWANTED = ("*/*", "consolidated*")  # patterns match slashes too: training checkpoints, the same weights once more


def find_model(name: str) -> Path:
    """Return the directory of a model. Raises QsunError if there is none."""
    path = Path(name)
    if path.is_dir():
        return path
    if name == DEMO:
        return base_directory()
    if _HUB_ID.fullmatch(name) and not path.exists() and name.partition("/")[0] not in (".", ".."):
        return _download(name)
    wrong = "is not a directory" if path.exists() else "is not a directory: it does not exist"
    raise QsunError(f"{name} {wrong}; give a Hugging Face model directory, a model id, or 'demo'")


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_WANTED), ignore_patterns=list(_UNWANTED)))
    except Exception as error:  # the hub's client raises many kinds, down to those of its HTTP library
        reason = shortened(error, 160)
        raise QsunError(f"{name} is not a directory here and could not be downloaded from the Hub: {reason}") from None


def load_tokenizer(directory: Path) -> Any | None:
    """Return the model's tokenizer, or None where the directory has none. Never runs code from the directory."""
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    present = [name for name in names if (directory / name).exists()]
    if not present:
        return None
    from transformers import AutoTokenizer

    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions, others what a missing package raises
        reason = shortened(error, 200)
    lacking = [name for name in ("sentencepiece", "google.protobuf") if not _installed(name)]
    if "tokenizer.json" not in present and lacking:
        packages = " ".join(lacking).replace("google.", "")
        raise QsunError(f"{directory}: tokenizer.model needs packages that are not installed; pip install {packages}")
    installed = ", ".join(f"{name} {version(name)}" for name in ("transformers", "tokenizers"))
    raise QsunError(
        f"{directory}: the tokenizer cannot be loaded: {reason}; it is damaged, or made for later versions than "
        f"{installed}"
    )


def tokenizer_content(file: Path) -> dict[str, Any]:
    """Return a tokenizer.json as the installed library writes it, or as it is if the library cannot read it.

    Versions write the same tokenizer differently: merges as strings or as pairs, an absent setting as null or false.
    """
    from tokenizers import Tokenizer

    try:
        content: dict[str, Any] = json.loads(Tokenizer.from_file(str(file)).to_str())
    except Exception:  # bare ones, for what a later version has written
        return read_json(file)
    return content


def tokenizer_settings(directory: Path) -> dict[str, Any]:
    """Return special tokens and what is added to a text, None where tokenizer_config.json has none; and the template.

    Both modules of a pair render a chat: a router sends them the same messages, not the same tokens.
    """
    file, jinja = directory / "tokenizer_config.json", directory / "chat_template.jinja"
    values = read_json(file) if file.exists() else {}
    settings = {key: values.get(key) for key in _SETTINGS}
    settings |= {key: v["content"] for key, v in settings.items() if isinstance(v, dict) and "content" in v}
    template = jinja.read_bytes().decode("utf-8", "replace") if jinja.exists() else ""
    return settings | {"chat_template": template or values.get("chat_template")}


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that would hold it
        return False


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return token ids; text that spells out its first special token does not get a second one."""
    start = tokenizer.bos_token or ""
    spelt = bool(start) and text.startswith(start)
    return tokenizer(text, add_special_tokens=not spelt, verbose=False)["input_ids"]
