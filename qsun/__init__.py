"""qsun: quantize, tune and serve the shared decode module of SUN (arXiv 2603.02599)."""

from typing import TYPE_CHECKING, Any

from qsun._version import __version__
from qsun.config import LayerSpec, Override, QuantConfig
from qsun.errors import QsunError, ResumeError

if TYPE_CHECKING:
    from qsun.decode import DecodeModule, load_decode
    from qsun.generation import generate, generate_stream
    from qsun.linear import QuantLinear
    from qsun.pairing import check_pair
    from qsun.pipeline import quantize
    from qsun.prefill import PrefillModule, load_prefill
    from qsun.tune_config import TuneConfig
    from qsun.tuning import tune


__all__ = [
    "__version__",
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

# torch and transformers take seconds to import; `qsun --help` and configuration errors need neither.
_HOMES = {
    "DecodeModule": "qsun.decode",
    "load_decode": "qsun.decode",
    "QuantLinear": "qsun.linear",
    "PrefillModule": "qsun.prefill",
    "load_prefill": "qsun.prefill",
    "check_pair": "qsun.pairing",
    "generate": "qsun.generation",
    "generate_stream": "qsun.generation",
    "quantize": "qsun.pipeline",
    "tune": "qsun.tuning",
    "TuneConfig": "qsun.tune_config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qsun' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
