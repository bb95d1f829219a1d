"""LoRA prefill modules that are served unmerged: opened by directory, read when a request needs them."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from qsun.adapters.adapter_weights import AdapterWeights
from qsun.adapters.shared_prefill import SharedPrefill
from qsun.errors import QsunError
from qsun.model.checkpoint import files_fingerprint, stored_quantization
from qsun.model.locate import find_model
from qsun.model.lora import ADAPTER_CONFIG, adapter_base, adapter_file, check_adapter, stored_adapter
from qsun.model.manifest import read_manifest
from qsun.model.pairing import ADAPTER_WEIGHTS, base_fingerprint, check_served_pair, find_base
from qsun.model.skeleton import empty_model
from qsun.runtime.decode_module import DecodeModule, load_decode
from qsun.runtime.prefill_module import PLAIN_ADAPTER, PrefillModule

log = logging.getLogger(__name__)
PREFILL_WEIGHTS = "prefill_weights"  # key of an adapter's qsun.json: what it was tuned on
_BASE, _DECODE = "base", "decode"


@dataclass(frozen=True)
class AdapterModule(PrefillModule):
    """A prefill module whose weights are shared with others.

    Attributes:
        model: of `shared`, and the same for all that share it.
        directory: of the adapter, or of the shared weights where it is these without an adapter.
        state: size and time of the last change of the adapter's files when it was checked; None without an adapter.
        rank: of the adapter; 0 without one.
    """

    shared: SharedPrefill = field(kw_only=True)
    state: tuple[tuple[int, int], ...] | None = field(default=None, kw_only=True)
    rank: int = field(default=0, kw_only=True)

    def load(self) -> AdapterWeights:
        """Read the adapter. Raises QsunError if it has changed since it was checked, or has NaN or Inf."""
        if _state(self.directory) != self.state:
            raise QsunError(f"adapter {self.directory} has changed since it was added; remove it and add it again")
        adapter = stored_adapter(self.shared.skeleton, self.directory)
        weights = AdapterWeights.of(adapter, self.shared.dtype, self.shared.device)
        for layer, pair in weights.layers.items():
            if not all(bool(tensor.isfinite().all()) for tensor in pair):
                raise QsunError(f"adapter {self.directory}: {layer} has NaN or Inf; tune it again")
        return weights


class AdapterLibrary:
    """Opens adapters for a decode module.

    Each set of weights that they share is loaded with the first adapter and freed with the last.

    Args:
        decode: an adapter that was tuned on its weights shares them; others share the full-precision base, which is
            the decode module itself where that is not quantized.
    """

    def __init__(self, decode: DecodeModule):
        self.decode = decode
        self._skeleton: Any = empty_model(decode.model.config)  # an adapter's base has the same, by check_pair
        self._shared: WeakValueDictionary[str, SharedPrefill] = WeakValueDictionary()  # the open adapters hold them
        self._lock = threading.Lock()  # weights are loaded once, also where two threads ask for them

    def open(self, directory: str | Path) -> AdapterModule:
        """Check an adapter and its pair with the decode module; its weights are read by `AdapterModule.load`.

        Raises:
            QsunError: not plain LoRA, or one that does not fit the decode module.
        """
        path = find_model(str(directory))
        if not (path / ADAPTER_CONFIG).exists():
            raise QsunError(f"{path} has no {ADAPTER_CONFIG}; it is not a LoRA adapter")
        adapter_file(path)
        check_served_pair(path, self.decode.directory)
        made = read_manifest(path)
        if made.get("kind") != "prefill_module":
            log.warning("%s", PLAIN_ADAPTER.format(path))
        state = _state(path)
        settings, _ = check_adapter(self._skeleton, path)
        shared = self._weights_of(path, made)  # which may load them
        return AdapterModule(shared.model, path, made, shared=shared, state=state, rank=settings.rank)

    def plain(self) -> AdapterModule:
        """Return shared weights without an adapter: the full-precision base's if an adapter needs those, or else the
        decode module's own; where no adapter is open, the base's."""
        bases = [shared for key, shared in self._shared.items() if key != _DECODE]
        shared = bases[0] if bases else self._shared.get(_DECODE) or self._base(find_base(self.decode.directory)[0])
        return AdapterModule(shared.model, self.decode.directory, shared=shared)

    def _weights_of(self, path: Path, made: dict[str, Any]) -> SharedPrefill:
        tuned_on, base = made.get(PREFILL_WEIGHTS, _BASE), base_fingerprint(made)
        if tuned_on == _DECODE:
            return self._share(_DECODE, lambda: self.decode)
        if tuned_on != _BASE:
            raise QsunError(f"{path}: {PREFILL_WEIGHTS} {tuned_on!r:.40} is unknown; use {_BASE!r} or {_DECODE!r}")
        return (self._shared.get(base) if base else None) or self._base(adapter_base(path))

    def _base(self, directory: Path) -> SharedPrefill:
        """Return the shared weights of a full-precision base, whatever the path by which it is named."""
        fingerprint = files_fingerprint(directory)
        if not stored_quantization(self.decode.directory) and fingerprint == files_fingerprint(self.decode.directory):
            return self._share(_DECODE, lambda: self.decode)
        weight = self.decode.model.model.embed_tokens.weight
        return self._share(fingerprint, lambda: load_decode(directory, weight.device, weight.dtype))

    def _share(self, key: str, load: Callable[[], DecodeModule]) -> SharedPrefill:
        with self._lock:
            shared = self._shared.get(key)
            if shared is None:
                shared = self._shared[key] = SharedPrefill(load().model)
            return shared


def adapter_directories(folder: Path) -> dict[str, Path]:
    """Return the adapters in a folder by the names of their own folders. Raises QsunError if there are none."""
    if not folder.is_dir():
        raise QsunError(f"{folder} is not a directory; give one whose folders are LoRA adapters")
    found = {path.name: path for path in sorted(folder.iterdir()) if (path / ADAPTER_CONFIG).is_file()}
    if not found:
        raise QsunError(f"{folder} has no folder with an {ADAPTER_CONFIG}; give one whose folders are LoRA adapters")
    return found


def _state(directory: Path) -> tuple[tuple[int, int], ...]:
    files = [directory / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
    try:
        return tuple((stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()])
    except OSError as error:
        raise QsunError(f"adapter {directory} cannot be read: {error.strerror or error}") from None
