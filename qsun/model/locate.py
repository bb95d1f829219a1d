"""From what a user typed to a model directory: a path, the packaged `demo`, or a model id on the hub."""

import logging
import re
from pathlib import Path
from typing import Any

from qsun.demo import base_directory
from qsun.errors import QsunError

DEMO = "demo"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WANTED = ("*.safetensors", "*.json", "tokenizer*", "*.model", "merges.txt", "vocab.*", "chat_template*", "LICENSE*")


def find_model(name: str) -> Path:
    """Directory of a model. Raises QsunError where there is none."""
    path = Path(name)
    if path.is_dir():
        return path
    if name == DEMO:
        return base_directory()
    if _HUB_ID.fullmatch(name) and not path.exists():
        return _download(name)
    raise QsunError(f"{name} is not a directory; give a Hugging Face model directory, a model id, or 'demo'")


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_WANTED)))
    except Exception as error:  # the hub's client raises many kinds, down to those of its HTTP library
        reason = " ".join(str(error).split())[:160]
        raise QsunError(f"{name} is no directory here, and the hub did not give it: {reason}") from None


def load_tokenizer(directory: Path) -> Any | None:
    """The model's tokenizer, or None where the directory has none. Never runs code from the directory."""
    if not any((directory / file).exists() for file in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return None
    from transformers import AutoTokenizer

    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise QsunError(f"{directory}: the tokenizer cannot be loaded: {' '.join(str(error).split())[:200]}") from None


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids; text that spells its first special token out does not get a second one."""
    start = tokenizer.bos_token or ""
    spelt = bool(start) and text.startswith(start)
    return tokenizer(text, add_special_tokens=not spelt, verbose=False)["input_ids"]
