"""Model directories on disk: read tensors by name without loading the model, and fingerprint them.

Only safetensors is read: a pickle can run code. Bytes are read, not mapped: the mapped pages of a large base would pile
up in memory.
"""

import hashlib
import json
import logging
import re
import struct
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsun.errors import QsunError, shortened

log = logging.getLogger(__name__)
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_COPY_BYTES = 1 << 24
STORED_DTYPES = {  # in the order of safetensors, which writes tensors of a later one first
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_VISION = ("vision_tower.", "vision_model.", "visual.", "audio_tower.", "multi_modal_projector.", "mm_projector.")
_OTHER_PARTS = (*_VISION, *(f"model.{part}" for part in _VISION))
_INSIDE = re.compile(r"(model\.)?language_model\.(model\.)?")
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Checkpoint:
    """The tensors of a Hugging Face model directory, or of one safetensors file.

    Names are those of a causal language model: a text model inside a multimodal one, and an inner model saved without
    its head, are read as transformers reads them.

    Attributes:
        directory: where they are.
        left_out: names of the tensors of a multimodal model's other parts.
        files: file name of each tensor.
        headers: safetensors header entry of each tensor: dtype, shape, data_offsets.
    Raises:
        QsunError: no such directory, no safetensors, a damaged or missing shard.
    """

    def __init__(self, path: Path):
        path = Path(path)
        self.directory = path.parent if path.is_file() else path
        self.files = dict.fromkeys(read_header(path)[0], path.name) if path.is_file() else _tensor_files(path)
        self.headers: dict[str, dict[str, Any]] = {}
        self._data_start: dict[str, int] = {}
        for file in sorted(set(self.files.values())):
            entries, self._data_start[file] = read_header(self.directory / file)
            self.headers |= {name: entry for name, entry in entries.items() if self.files.get(name) == file}
        missing = sorted(set(self.files) - set(self.headers))
        if missing:
            raise QsunError(
                f"{self.directory}: the index says {missing[0]} is in {self.files[missing[0]]}, but it is not; "
                "download the model again"
            )
        plain = _plain_names(self.files) if path.is_dir() else {name: name for name in self.files}
        self.left_out = sorted(self.files.keys() - plain.keys())
        self.files = {plain[name]: file for name, file in self.files.items() if name in plain}
        self.headers = {plain[name]: entry for name, entry in self.headers.items() if name in plain}

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def names(self, prefix: str = "") -> list[str]:
        """Return the tensor names under a prefix, sorted."""
        return sorted(name for name in self.files if name.startswith(prefix))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.headers[name]["shape"])

    def dtype(self, name: str) -> torch.dtype | None:
        """Return the torch dtype of a floating weight; None for any other tensor."""
        dtype = STORED_DTYPES[self.headers[name]["dtype"]]
        return dtype if dtype in _WEIGHT_DTYPES else None

    def size_bytes(self, names: Iterable[str]) -> int:
        return sum(end - start for start, end in (self.headers[name]["data_offsets"] for name in names))

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors by name, on the CPU, as stored. Raises QsunError for a name that does not exist."""
        names = list(names)
        absent = [name for name in names if name not in self.files]
        if absent:
            raise QsunError(f"{self.directory} has no tensor {absent[0]}; is config.json that of another model?")
        try:
            return {name: self._tensor(name) for name in sorted(names, key=self._position)}
        except OSError as error:
            raise QsunError(f"{self.directory} cannot be read: {error}") from None

    def _position(self, name: str) -> tuple[str, int]:
        return self.files[name], self.headers[name]["data_offsets"][0]

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Return rows first .. last - 1 of a tensor; nothing else of it is read."""
        return self._tensor(name, (first, last))

    def _tensor(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        shape = list(self.headers[name]["shape"])
        if rows is not None:
            shape[0] = rows[1] - rows[0]
        tensor = torch.empty(shape, dtype=STORED_DTYPES[self.headers[name]["dtype"]])
        bytes_of = tensor.view(-1).view(torch.uint8)
        filled = 0
        for piece in self._raw(name, rows):
            bytes_of[filled : filled + len(piece)] = torch.frombuffer(piece, dtype=torch.uint8)
            filled += len(piece)
        return tensor

    def same(self, name: str, other: str) -> bool:
        """Whether two tensors hold the same bytes."""
        kind = [(self.headers[n]["dtype"], self.headers[n]["shape"]) for n in (name, other)]
        return kind[0] == kind[1] and all(a == b for a, b in zip(self._raw(name), self._raw(other), strict=True))

    def fingerprint(self) -> str:
        """Return a SHA-256 over every tensor's name, dtype, shape and bytes, whatever the sharding.

        Raises:
            QsunError: a tensor has NaN or Inf; this reads all bytes before any work, so it checks them too.
        """
        whole = hashlib.sha256()
        for name in self.names():
            entry = self.headers[name]
            whole.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
            for piece in self._raw(name):
                whole.update(piece)
                dtype = self.dtype(name)
                # NaN is the least and the greatest where there is one; eight times as fast as isfinite of all
                if dtype is not None and not all(map(torch.isfinite, torch.frombuffer(piece, dtype=dtype).aminmax())):
                    raise QsunError(f"{name} has NaN or Inf; the model is damaged, or overflowed when it was converted")
        return whole.hexdigest()

    def _raw(self, name: str, rows: tuple[int, int] | None = None) -> Iterator[bytearray]:
        """Yield the bytes of a tensor, or of some of its rows, in pieces, without mapping the file."""
        start, end = self.headers[name]["data_offsets"]
        if rows is not None:
            width = (end - start) // max(1, self.headers[name]["shape"][0])
            start, end = start + rows[0] * width, start + rows[1] * width
        with open(self.directory / self.files[name], "rb") as file:
            file.seek(self._data_start[self.files[name]] + start)
            remaining = end - start
            while remaining:
                piece = bytearray(file.read(min(_COPY_BYTES, remaining)))
                if not piece:
                    raise QsunError(f"{file.name} ends inside {name}; download it again")
                remaining -= len(piece)
                yield piece


def files_fingerprint(directory: Path) -> str:
    """Return `Checkpoint.fingerprint`, computed again only if a file of weights has changed."""
    files = sorted(directory.glob("*.safetensors*"))
    return _fingerprint(directory, tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


@lru_cache(maxsize=16)
def _fingerprint(directory: Path, _: tuple[tuple[str, int, int], ...]) -> str:
    return Checkpoint(directory).fingerprint()


def check_full_precision(checkpoint: Checkpoint) -> None:
    """Raise QsunError for a model that is quantized already, whatever way, and say what it is."""
    directory, stored = checkpoint.directory, stored_quantization(checkpoint.directory)
    if stored:
        kind = " ".join(str(stored[key]) for key in ("quant_method", "format") if stored.get(key)) or "in some way"
        raise QsunError(f"{directory} is quantized already ({kind}); give the full-precision base")
    for name in checkpoint.names():
        dtype = checkpoint.headers[name]["dtype"]
        if name.endswith("weight") and STORED_DTYPES[dtype] not in _WEIGHT_DTYPES:
            raise QsunError(
                f"{directory}: {name} is stored as {dtype}, so the model is quantized already; give the full-precision "
                "base, in F32, BF16 or F16"
            )


def _tensor_files(directory: Path) -> dict[str, str]:
    """Return the file of each tensor, without buffers that old Llama checkpoints store and every model computes."""
    return {
        name: file for name, file in _all_tensor_files(directory).items() if not name.endswith(".rotary_emb.inv_freq")
    }


def _all_tensor_files(directory: Path) -> dict[str, str]:
    if not directory.is_dir():
        raise QsunError(f"{directory} is not a directory; give a Hugging Face model directory, or 'demo'")
    index = directory / INDEX_FILE
    single = (directory / SINGLE_FILE).is_file()
    if index.is_file() and single:
        log.warning("%s has %s and %s; the first is read, as transformers does", directory, SINGLE_FILE, INDEX_FILE)
    elif index.is_file():
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
            raise QsunError(f"{index} names no tensors; download it again")
        lost = sorted(name for name in set(files.values()) if not (directory / name).is_file())
        if lost:
            raise QsunError(f"{directory}: the index names {lost[0]}, which is not there; download the model again")
        return files
    if single:
        return dict.fromkeys(read_header(directory / SINGLE_FILE)[0], SINGLE_FILE)
    if list(directory.glob("*.bin")) or list(directory.glob("*.pt*")):
        raise QsunError(f"{directory} has only pickled weights, which can run code; convert them to safetensors first")
    raise QsunError(f"{directory} has no {SINGLE_FILE} and no {INDEX_FILE}; is it a Hugging Face model directory?")


def _plain_names(names: Iterable[str]) -> dict[str, str]:
    """Return the name in a causal language model of each stored tensor that belongs to one."""
    names = list(names)
    if "embed_tokens.weight" in names:  # an inner model, saved by itself
        return {name: name if name.startswith("lm_head.") else f"model.{name}" for name in names}
    return {name: plain_name(name) for name in names if not name.startswith(_OTHER_PARTS)}


def plain_name(name: str) -> str:
    """Return the name in a causal language model of a tensor or layer, which may be that of a multimodal model."""
    rest = name[match.end() :] if (match := _INSIDE.match(name)) else name
    return rest if rest == name or rest.startswith("lm_head.") else f"model.{rest}"


def stored_quantization(directory: Path) -> dict[str, Any]:
    """Return quantization_config of config.json; empty if there is none. Raises QsunError if it is not an object."""
    config = directory / "config.json"
    found = (read_json(config).get("quantization_config") if config.exists() else None) or {}
    if not isinstance(found, dict):
        raise QsunError(
            f"{config}: quantization_config {shortened(repr(found))} is not a JSON object; download the model again"
        )
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises QsunError naming the file and line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise QsunError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise QsunError(f"{path} does not hold a JSON object")
    return value


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Return the entries of a safetensors file and the offset of its data. Raises QsunError for a damaged file."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, 100 << 20):
                raise ValueError("its header is longer than the file")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        if not all("shape" in entry and entry["dtype"] in STORED_DTYPES for entry in entries.values()):
            raise ValueError("a tensor without a shape, or of a dtype that safetensors does not have")
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, struct.error) as error:
        raise QsunError(f"{path} is not a valid safetensors file ({error}); download it again") from None
    if 8 + length + end != size:
        raise QsunError(f"{path} is damaged: {size} bytes where its header says {8 + length + end}; download it again")
    return entries, 8 + length


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_COPY_BYTES):
            digest.update(piece)
    return digest.hexdigest()
