"""qsun: quantize, tune and serve the shared decode module of SUN (arXiv 2603.02599)."""

from typing import TYPE_CHECKING, Any

from qsun._version import __version__
from qsun.errors import QsunError, ResumeError

if TYPE_CHECKING:
    from qsun.adapters.adapter_module import AdapterLibrary
    from qsun.config import LayerSpec, Override, QuantConfig
    from qsun.engine.generation import generate, generate_stream
    from qsun.model.pairing import check_pair
    from qsun.quantization.run import quantize
    from qsun.runtime.decode_module import DecodeModule, load_decode
    from qsun.runtime.prefill_module import PrefillModule, load_prefill
    from qsun.runtime.quant_linear import QuantLinear
    from qsun.tuning.config import TuneConfig
    from qsun.tuning.tuner import tune


__all__ = [
    "__version__",
    "AdapterLibrary",
    "DecodeModule",
    "LayerSpec",
    "Override",
    "PrefillModule",
    "QsunError",
    "QuantConfig",
    "QuantLinear",
    "ResumeError",
    "TuneConfig",
    "check_pair",
    "generate",
    "generate_stream",
    "load_decode",
    "load_prefill",
    "quantize",
    "tune",
]

# torch and transformers take seconds to import, and kernels run without pydantic: everything is imported on first use.
_HOMES = {
    "AdapterLibrary": "qsun.adapters.adapter_module",
    "LayerSpec": "qsun.config",
    "Override": "qsun.config",
    "QuantConfig": "qsun.config",
    "DecodeModule": "qsun.runtime.decode_module",
    "load_decode": "qsun.runtime.decode_module",
    "QuantLinear": "qsun.runtime.quant_linear",
    "PrefillModule": "qsun.runtime.prefill_module",
    "load_prefill": "qsun.runtime.prefill_module",
    "check_pair": "qsun.model.pairing",
    "generate": "qsun.engine.generation",
    "generate_stream": "qsun.engine.generation",
    "quantize": "qsun.quantization.run",
    "tune": "qsun.tuning.tuner",
    "TuneConfig": "qsun.tuning.config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qsun' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
