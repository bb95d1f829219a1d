"""The names under which workers serve modules. A module of its own: what routes requests needs no torch."""

from dataclasses import dataclass

_NAME_DIGITS = 16


@dataclass(frozen=True)
class ServedNames:
    """Model names that vLLM workers serve.

    Attributes:
        decode: of all decode workers.
        prefill: of each model at its prefill workers. Two models may share a module.
        shared: of the weights under adapters; "" without adapters.
    """

    decode: str
    prefill: dict[str, str]
    shared: str = ""


def served_name(fingerprint: str) -> str:
    """Return a worker's `--served-model-name`: one with other weights does not know it, and answers 404."""
    return f"qsun-{fingerprint[:_NAME_DIGITS]}"
