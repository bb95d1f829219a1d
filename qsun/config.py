"""Validated settings: from the command line, YAML or Python, checked where they enter, saved with the result."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from qsun.errors import QsunError, one_line

Method = Literal["rtn", "gptq", "awq", "awq+gptq", "refined"]
Format = Literal["gptq", "awq", "compressed-tensors"]
Bits = Literal[2, 3, 4, 8]
GroupSize = Literal[-1, 32, 64, 128]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
METHODS: tuple[str, ...] = get_args(Method)
FORMATS: tuple[str, ...] = get_args(Format)
GROUP_SIZES: tuple[int, ...] = get_args(GroupSize)
DTYPES: tuple[str, ...] = get_args(Dtype)
_LARGEST_FILE_BYTES = 1 << 20


class Section(BaseModel):
    """A frozen mapping of settings inside another; unknown keys and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class Settings(Section):
    """Frozen settings that say in one line what is wrong with them.

    Raises:
        QsunError: an unknown key, with the nearest known one, or a value that is invalid, with what is allowed.
    """

    def __init__(self, *positional: Any, **values: Any):
        values = dict(zip(type(self).model_fields, positional, strict=False)) | values
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise QsunError(one_line(error, type(self))) from None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the settings that plain values name."""
        return cls(**{str(key): value for key, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as YAML or JSON can hold them; `from_dict` reads them back."""
        return self.model_dump()

    def replace(self, **changes: Any) -> Self:
        """Return a copy with other values, which are checked too."""
        return type(self)(**(dict(self) | changes))


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number and refuses a repeated key, of which it would keep the last only."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} occurs twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)


def read_config_file(path: Path, kind: str = "config file") -> dict[str, Any]:
    """Read settings from a YAML (or JSON) file; `group-size` is `group_size`, and `kind` names the file in errors.

    Raises:
        QsunError: a file that cannot be read, is not YAML, has a key twice or is larger than 1 MiB.
    """
    try:
        if path.stat().st_size > _LARGEST_FILE_BYTES:
            raise QsunError(f"{kind} {path} is larger than {_LARGEST_FILE_BYTES} bytes; is it the right file?")
        values = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Loader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise QsunError(f"{kind} {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise QsunError(f"{kind} {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise QsunError(f"{kind} {path} is not a mapping of settings, such as 'bits: 4'")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


@dataclass(frozen=True)
class LayerSpec:
    """How one linear layer is stored. bits 16 means: left in the base's precision."""

    bits: int
    group_size: int
    sym: bool

    @property
    def quantized(self) -> bool:
        return self.bits != 16


class LayerSettings(Section):
    """What an override can set; what it leaves out stays as it is."""

    bits: Literal[2, 3, 4, 8, 16] = 16
    group_size: GroupSize = 128
    sym: bool = True


class Override(Settings):
    """`REGEX=bits:8,group_size:32`, or `REGEX=skip`: other settings for the layers whose name the pattern finds."""

    pattern: str
    settings: LayerSettings

    @classmethod
    def parse(cls, text: str) -> "Override":
        pattern, equals, body = text.rpartition("=")
        if not equals or not pattern:
            raise QsunError(f"override {text!r} is not of the form 'REGEX=bits:8,group_size:32' or 'REGEX=skip'")
        if body.strip() == "skip":
            return cls(pattern=pattern, settings=LayerSettings(bits=16))
        pairs = [item.partition(":") for item in body.split(",")]
        try:
            settings: Any = {key.strip().replace("-", "_"): yaml.safe_load(value.lower()) for key, _, value in pairs}
            return cls(pattern=pattern, settings=settings)
        except (QsunError, yaml.YAMLError) as error:
            reason = " ".join(str(error).replace("settings.", "").split())
            raise QsunError(f"override {text!r}: {reason}") from None

    @field_validator("pattern")
    @classmethod
    def _is_regular_expression(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise QsunError(f"override pattern {pattern!r} is not a regular expression: {error}") from None
        return pattern

    def matches(self, layer: str) -> bool:
        """Whether the pattern finds this full name; layers.1 does not find layers.10."""
        return _whole_numbers(self.pattern).search(layer) is not None

    @property
    def given(self) -> dict[str, Any]:
        """The settings that it names."""
        return self.settings.model_dump(exclude_unset=True)

    def text(self) -> str:
        """Return the override as `parse` reads it."""
        return f"{self.pattern}={','.join(f'{key}:{value}' for key, value in self.given.items())}"


@cache
def _whole_numbers(pattern: str) -> re.Pattern[str]:
    """Return the pattern, kept from beginning or ending inside a number."""
    flags = re.compile(pattern).flags
    pattern = re.sub(r"^\(\?[a-zA-Z]+\)", "", pattern)  # flags may only stand at the start
    edge = r"(?:(?<!\d)|(?!\d))"
    return re.compile(f"{edge}(?:{pattern}){edge}", flags)


def _spelled(value: object) -> object:
    """Return the name of a choice however it is spelled: GPTQ, compressed_tensors."""
    return value.lower().replace("_", "-") if isinstance(value, str) else value


class QuantConfig(Settings):
    """Everything that decides the bytes of a decode module, but the base and the calibration data.

    Attributes:
        method: rtn, gptq, awq, awq+gptq or refined (docs/passes.md).
        bits, group_size, sym: of every linear layer; group_size -1 is one group a row.
        desc_act: classic activation order whose groups follow the visiting order (needs a g_idx; gptq format only).
        static_groups: scales are found before GPTQ starts; False finds each when its group is reached.
        damp_percent: added to the Hessian's diagonal, as a fraction of its mean.
        shrinkage: with refined, also added to the diagonal, as a fraction of each input's own entry; this takes the
            correlations of inputs back towards none.
        scale_search: search each group's range for the least squared error; False takes minimum and maximum.
        sweeps: coordinate-descent passes after GPTQ.
        polish: steps in which the scales of all layers learn together (quantization/polish.py).
        lm_head: quantize the output projection as well.
        overrides: per-layer settings; a later one wins.
        format: of the files: gptq, awq, compressed-tensors.
        samples, seq_len: how much calibration data is used.
        dtype: of the computation; auto as in `qsun.device.compute_dtype`.
        scale_dtype: what scales are rounded to; auto follows the base, as engines cast scales to the model's dtype.
    """

    method: Annotated[Method, BeforeValidator(_spelled)] = "refined"
    bits: Bits = 4
    group_size: GroupSize = 128
    sym: bool = True
    desc_act: bool = False
    static_groups: bool = True
    damp_percent: Annotated[float, Field(ge=1e-6, le=1)] = 0.01
    shrinkage: Annotated[float, Field(ge=0, le=10)] = 0.25
    scale_search: bool = True
    sweeps: Annotated[int, Field(ge=0, le=100)] = 2
    polish: Annotated[int, Field(ge=0, le=100_000)] = 0
    lm_head: bool = False
    overrides: tuple[Override, ...] = ()
    format: Annotated[Format, BeforeValidator(_spelled)] = "gptq"
    samples: Annotated[int, Field(ge=1, le=1 << 20)] = 128
    seq_len: Annotated[int, Field(ge=2, le=1 << 20)] = 2048
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    dtype: Dtype = "auto"
    scale_dtype: Literal["auto", "float16", "bfloat16"] = "auto"

    @field_validator("overrides", mode="before")
    @classmethod
    def _parsed(cls, overrides: Any) -> tuple[Override, ...]:
        if not isinstance(overrides, (list, tuple)) or not all(isinstance(o, (str, Override)) for o in overrides):
            raise QsunError(f"overrides {overrides!r} is not a list of strings such as 'down_proj=bits:8'")
        return tuple(Override.parse(o) if isinstance(o, str) else o for o in overrides)

    @model_validator(mode="after")
    def _fits_the_method(self) -> Self:
        if self.desc_act and self.method in ("rtn", "awq"):
            raise QsunError(f"desc_act has no meaning for method {self.method}; use gptq, awq+gptq or refined")
        if self.polish and not self.calibrated:
            raise QsunError(f"polish learns from calibration data, and method {self.method} uses none; use refined")
        return self

    @property
    def calibrated(self) -> bool:
        """Whether the method looks at activations."""
        return self.method != "rtn"

    def spec_for(self, layer: str) -> LayerSpec:
        """Return the settings of the layer with this full name, e.g. model.layers.0.mlp.up_proj."""
        settings: dict[str, Any] = {"bits": self.bits, "group_size": self.group_size, "sym": self.sym}
        for override in self.overrides:
            if override.matches(layer):
                settings |= override.given
        return LayerSpec(**settings)

    def to_dict(self) -> dict[str, Any]:
        return dict(self) | {"overrides": [override.text() for override in self.overrides]}


def check_one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not any(value == choice and type(value) is type(choice) for choice in allowed):
        raise QsunError(f"{name} {value!r} is not supported; use one of {', '.join(str(a) for a in allowed)}")
