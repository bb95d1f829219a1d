"""The modules of an evaluation: the last prefill module and the last two decode modules stay for the next parts."""

import torch

from qsun.device import load_dtype
from qsun.eval.report.variants import Entry
from qsun.model.locate import find_model
from qsun.model.pairing import check_served_pair
from qsun.runtime.decode_module import DecodeModule, load_decode
from qsun.runtime.prefill_module import PrefillModule, load_prefill


class LoadedModules:
    """Attributes: device, dtype: of all modules."""

    def __init__(self, device: torch.device, dtype: str):
        self.device, self.dtype = device, load_dtype(dtype, device)
        self._decoders: dict[str, DecodeModule] = {}
        self._prefill: tuple[str, PrefillModule] | None = None

    def decoder(self, name: str) -> DecodeModule:
        found = self._decoders.pop(name, None)
        if found is None:
            while len(self._decoders) > 1:
                self._decoders.pop(next(iter(self._decoders)))  # the least recently used
            found = load_decode(name, self.device, self.dtype)
        self._decoders[name] = found
        return found

    def reference(self, entry: Entry) -> DecodeModule:
        """Return the full-precision decoder of an entry's decode module: its base, or itself."""
        base = entry.full_precision()[1]
        return self.decoder(entry.decode if find_model(base) == find_model(entry.decode) else base)

    def pair(self, entry: Entry) -> tuple[PrefillModule, DecodeModule]:
        if entry.alone:
            self._prefill = None
            own = self.decoder(entry.decode)
            return PrefillModule(own.model, own.directory, own.manifest), own
        decode = self.decoder(entry.decode)
        if self._prefill is None or self._prefill[0] != entry.prefill:
            self._prefill = None  # free its memory first
            self._prefill = entry.prefill, load_prefill(entry.prefill, decode, self.dtype, self.device)
        else:
            check_served_pair(entry.prefill, entry.decode)
        return self._prefill[1], decode
