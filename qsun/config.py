"""The one configuration object: built from the command line, YAML or Python, validated here, saved with the result."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qsun.errors import QsunError

METHODS = ("rtn", "gptq", "awq", "awq+gptq", "refined")
FORMATS = ("gptq", "awq", "compressed-tensors")
BITS = (2, 3, 4, 8)
GROUP_SIZES = (-1, 32, 64, 128)
DTYPES = ("auto", "float32", "bfloat16", "float16")
SCALE_DTYPES = ("auto", "float16", "bfloat16")
CALIBRATED = ("gptq", "awq", "awq+gptq", "refined")


@dataclass(frozen=True)
class LayerSpec:
    """How one linear layer is stored. bits 16 means: left in the base's precision."""

    bits: int
    group_size: int
    sym: bool

    @property
    def quantized(self) -> bool:
        return self.bits != 16


@dataclass(frozen=True)
class Override:
    """`REGEX=bits:8,group_size:32`, or `REGEX=skip`: other settings for the layers whose name the pattern finds."""

    pattern: str
    settings: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str) -> "Override":
        pattern, equals, body = text.rpartition("=")
        if not equals or not pattern:
            raise QsunError(f"override {text!r} is not of the form 'REGEX=bits:8,group_size:32' or 'REGEX=skip'")
        if body.strip() == "skip":
            return cls(pattern, {"bits": 16})
        pairs = [item.partition(":") for item in body.split(",")]
        return cls(pattern, {key.strip(): _parse_setting(text, key.strip(), value) for key, _, value in pairs})

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise QsunError(f"override pattern {self.pattern!r} is not a regular expression: {error}") from None
        for key, value in self.settings.items():
            allowed = {"bits": (*BITS, 16), "group_size": GROUP_SIZES, "sym": (True, False)}.get(key)
            if allowed is None:
                raise QsunError(f"override {self.pattern!r} sets {key!r}; it can set bits, group_size and sym, or skip")
            check_one_of(f"{key} in override {self.pattern!r}", value, allowed)

    def text(self) -> str:
        """The same override as `parse` reads it."""
        return f"{self.pattern}={','.join(f'{key}:{value}' for key, value in self.settings.items())}"


def _parse_setting(text: str, key: str, value: str) -> int | bool:
    value = value.strip().lower()
    if key == "sym" and value in ("true", "false"):
        return value == "true"
    try:
        return int(value)
    except ValueError:
        raise QsunError(f"override {text!r}: {value!r} is no value for {key!r}; write bits:8 or sym:false") from None


@dataclass(frozen=True)
class QuantConfig:
    """Everything that decides the bytes of a decode module, but the base and the calibration data.

    Attributes:
        method: rtn, gptq, awq, awq+gptq or refined (docs/passes.md).
        bits, group_size, sym: of every linear layer; group_size -1 is one group a row.
        desc_act: classic activation order whose groups follow the visiting order (needs a g_idx; gptq format only).
        static_groups: scales are found before GPTQ starts; False finds each when its group is reached.
        damp_percent: added to the Hessian's diagonal, as a fraction of its mean.
        scale_search: search each group's range for the least squared error; False takes minimum and maximum.
        sweeps: coordinate-descent passes after GPTQ.
        lm_head: quantize the output projection as well.
        overrides: per-layer settings; a later one wins.
        format: of the files: gptq, awq, compressed-tensors.
        samples, seq_len: how much calibration data is used.
        dtype: of the computation; auto is float32 on a CPU and the base's own on a GPU.
        scale_dtype: what scales are rounded to; auto follows the base, as engines cast scales to the model's dtype.
    """

    method: str = "refined"
    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    static_groups: bool = True
    damp_percent: float = 0.01
    scale_search: bool = True
    sweeps: int = 2
    lm_head: bool = False
    overrides: tuple[Override, ...] = field(default=())
    format: str = "gptq"
    samples: int = 128
    seq_len: int = 2048
    seed: int = 0
    dtype: str = "auto"
    scale_dtype: str = "auto"

    def __post_init__(self) -> None:
        overrides = tuple(Override.parse(o) if isinstance(o, str) else o for o in self.overrides)
        object.__setattr__(self, "overrides", overrides)
        for name, allowed in (
            ("method", METHODS),
            ("bits", BITS),
            ("group_size", GROUP_SIZES),
            ("format", FORMATS),
            ("dtype", DTYPES),
            ("scale_dtype", SCALE_DTYPES),
        ):
            check_one_of(name, getattr(self, name), allowed)
        for name in ("sym", "desc_act", "static_groups", "scale_search", "lm_head"):
            check_one_of(name, getattr(self, name), (True, False))
        for name, low, high in (
            ("damp_percent", 1e-6, 1.0),
            ("sweeps", 0, 100),
            ("samples", 1, 1 << 20),
            ("seq_len", 2, 1 << 20),
            ("seed", 0, 2**32 - 1),
        ):
            check_between(name, getattr(self, name), low, high)
        if self.desc_act and self.method in ("rtn", "awq"):
            raise QsunError(f"desc_act has no meaning for method {self.method}; use gptq, awq+gptq or refined")

    @property
    def calibrated(self) -> bool:
        """Whether the method looks at activations."""
        return self.method in CALIBRATED

    def spec_for(self, layer: str) -> LayerSpec:
        """Settings of the layer with this full name, e.g. model.layers.0.mlp.up_proj."""
        settings: dict[str, Any] = {"bits": self.bits, "group_size": self.group_size, "sym": self.sym}
        for override in self.overrides:
            if re.search(override.pattern, layer):
                settings.update(override.settings)
        return LayerSpec(**settings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML or JSON can hold them; `from_dict` reads it back."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return values | {"overrides": [override.text() for override in self.overrides]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "QuantConfig":
        """Raises QsunError for a key that is not a setting, or a value that does not fit."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(map(str, set(values) - known))
        if unknown:
            raise QsunError(f"unknown setting {unknown[0]!r}; known are: {', '.join(sorted(known))}")
        settings: dict[str, Any] = dict(values)
        if "overrides" in settings:
            overrides = settings["overrides"]
            if not isinstance(overrides, (list, tuple)) or not all(isinstance(o, (str, Override)) for o in overrides):
                raise QsunError(f"overrides {overrides!r} is no list of texts such as 'down_proj=bits:8'")
            settings["overrides"] = tuple(overrides)
        return cls(**settings)


def read_config_file(path: Path) -> dict[str, Any]:
    """Settings from a YAML (or JSON) file of one mapping."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise QsunError(f"config file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise QsunError(f"config file {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise QsunError(f"config file {path} holds no mapping of settings, such as 'bits: 4'")
    return values


def check_one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not any(value == choice and type(value) is type(choice) for choice in allowed):
        raise QsunError(f"{name} {value!r} is not supported; use one of {', '.join(str(a) for a in allowed)}")


def check_between(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise QsunError(f"{name} {value!r} is out of range; use a number from {low} to {high}")
    if isinstance(low, int) and not isinstance(value, int):
        raise QsunError(f"{name} {value!r} is not a whole number")
