"""LoRA prefill modules: y = W x + (alpha / r) B A x with W frozen (arXiv 2106.09685).

They are stored as peft stores them, adapter_config.json and adapter_model.safetensors, and peft reads ours; tuning and
merging need no more than what is here, so peft itself is not needed.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qsun.errors import QsunError
from qsun.model.architectures import architecture_of
from qsun.model.checkpoint import Checkpoint, files_fingerprint, plain_name, read_json
from qsun.model.manifest import read_manifest, write_json
from qsun.model.output_dir import save_tensors
from qsun.model.pairing import ADAPTER, ADAPTER_WEIGHTS, named_base, on_decode_weights
from qsun.model.skeleton import linear_of, plain_linear

ADAPTER_CONFIG = ADAPTER
_PREFIX = "base_model.model."
_PARTS = ("lora_A", "lora_B")
# Settings of peft that change what an adapter computes, and the values under which it is plain LoRA.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "layer_replication": (None,),
    # the others (pissa, olora, corda, loftq, lora_ga) take a part of the base out, to which the adapter then belongs
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "alora_invocation_tokens": (None,),
    "target_parameters": (None, []),
    **dict.fromkeys(("use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out"), (False, None)),
}


class LoraLinear(nn.Module):
    """A frozen linear layer, full precision or quantized, with an adapter.

    lora_A (rank, in) and lora_B (out, rank) are float32, whatever the layer computes in.
    """

    def __init__(self, linear: Any, a: Tensor, b: Tensor, scale: float):
        super().__init__()
        self.linear, self.scale = linear, scale
        device = next(chain(linear.parameters(), linear.buffers())).device
        self.lora_A = nn.Parameter(a.to(device, torch.float32))
        self.lora_B = nn.Parameter(b.to(device, torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        low = nn.functional.linear(x, self.lora_A.to(x.dtype))
        wide: Tensor = self.linear(x)
        return wide + self.scale * nn.functional.linear(low, self.lora_B.to(x.dtype))

    def merged(self) -> nn.Linear:
        """Return one linear layer in the place of the two, added in float32 and rounded once."""
        quantized = not isinstance(self.linear, nn.Linear)
        weight = self.linear.weight_in(torch.float32) if quantized else self.linear.weight
        dtype = self.linear.dtype if quantized else weight.dtype
        return plain_linear(merged_weight(weight, self.lora_A, self.lora_B, self.scale).to(dtype), self.linear.bias)


def merged_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return the (out, in) float32 sum of a layer and its adapter."""
    return weight.detach().float() + scale * (b.float() @ a.float()).detach()


@dataclass(frozen=True)
class AdapterSettings:
    """rank, alpha, and whether the scale is alpha / sqrt(rank) instead of alpha / rank."""

    rank: int
    alpha: float
    rslora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def adapter_base(directory: Path) -> Path:
    """Return the model whose weights an adapter was tuned on: its base, or a decode module.

    Raises QsunError if it is missing or has changed.
    """
    base, made = named_base(directory), read_manifest(directory)
    on_decode = on_decode_weights(directory)
    wanted = made.get("prefill_weights_fingerprint" if on_decode else "base_fingerprint")
    if wanted and files_fingerprint(base) != wanted:
        kind = "decode module" if on_decode else "base"
        raise QsunError(
            f"{base} is not the {kind} that the adapter {directory} was tuned on: their fingerprints differ"
        )
    return base


@dataclass(frozen=True)
class Adapter:
    """Settings, and lora_A (rank, in) and lora_B (out, rank) by the name of their layer."""

    settings: AdapterSettings
    weights: dict[str, tuple[Tensor, Tensor]]


def fresh_adapter(model: Any, settings: AdapterSettings, seed: int, targets: Sequence[str] = ()) -> Adapter:
    """Return a fresh adapter on the CPU; only shapes of the model are read, which may be on the meta device.

    targets: last parts of the names of linear layers, such as q_proj; empty: all linear layers of the blocks.
    """
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for name in target_names(model.config, targets):
        linear = linear_of(model, name)
        a = torch.empty(settings.rank, linear.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=random)
        weights[name] = a, torch.zeros(linear.out_features, settings.rank)
    return Adapter(settings, weights)


def place_adapter(model: Any, adapter: Adapter, prefix: str = "") -> None:
    """Put an adapter on those of its layers whose names begin with the prefix."""
    for name, (a, b) in adapter.weights.items():
        if name.startswith(prefix):
            model.set_submodule(name, LoraLinear(linear_of(model, name), a, b, adapter.settings.scale))


def target_names(config: Any, targets: Sequence[str] = ()) -> list[str]:
    """Return the full names of the linear layers that an adapter is put on. Raises QsunError for an unknown target."""
    names = architecture_of(config.model_type).all_linear_names(config.num_hidden_layers)
    known = dict.fromkeys(name.rpartition(".")[2] for name in names)
    unknown = [target for target in targets if target not in known]
    if unknown:
        raise QsunError(
            f"LoRA target {unknown[0]!r} is not a linear layer of a {config.model_type}; use {', '.join(known)}"
        )
    return [name for name in names if not targets or name.rpartition(".")[2] in targets]


def read_adapter(model: Any, directory: Path) -> Adapter:
    """Put an adapter of this directory on the model's layers. Raises QsunError for one that is not plain LoRA."""
    adapter = stored_adapter(model, directory)
    place_adapter(model, adapter)
    return adapter


def stored_adapter(model: Any, directory: Path) -> Adapter:
    """Read an adapter of this model, which may be on the meta device. Raises QsunError if it is not plain LoRA."""
    settings, layers = check_adapter(model, directory)
    file = adapter_file(directory)
    tensors = file.load(file.names())
    return Adapter(settings, {layer: (tensors[a], tensors[b]) for layer, (a, b) in layers.items()})


def check_adapter(model: Any, directory: Path) -> tuple[AdapterSettings, dict[str, tuple[str, str]]]:
    """Check an adapter of this model, which may be on the meta device, without reading its weights.

    Returns:
        Its settings, and the names of its two tensors by the name of their layer.
    Raises:
        QsunError: it is not plain LoRA, or does not fit the model.
    """
    settings, file = read_settings(directory), adapter_file(directory)
    path = directory / ADAPTER_WEIGHTS
    known, left, layers = set(target_names(model.config)), dict.fromkeys(file.names()), {}
    for stored in adapted_layers(file):
        layer = plain_name(stored)
        a, b = names = [f"{_PREFIX}{stored}.{part}.weight" for part in _PARTS]
        if layer not in known or not all(name in left for name in names):
            odd = next(name for name in left if stored in name and (stored or ".lora_" not in name))
            raise QsunError(
                f"{path} has {odd}, which is not lora_A or lora_B of a linear layer of its base's blocks; "
                "merge the adapter into its base first"
            )
        linear, shapes = linear_of(model, layer), [list(file.shape(name)) for name in names]
        if shapes != [[settings.rank, linear.in_features], [linear.out_features, settings.rank]]:
            raise QsunError(f"{path}: {layer} is {shapes[0]} and {shapes[1]}, not of rank {settings.rank}")
        layers[layer] = a, b
        del left[a], left[b]
    if left:
        raise QsunError(f"{path} has {next(iter(left))}, which is not plain LoRA")
    return settings, layers


def adapter_file(directory: Path) -> Checkpoint:
    """Return the tensors of an adapter as stored. Raises QsunError if there are none, or only pickled ones."""
    if not (directory / ADAPTER_WEIGHTS).is_file():
        raise QsunError(f"{directory} has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}; pickled adapters are not read")
    return Checkpoint(directory / ADAPTER_WEIGHTS)


def adapted_layers(file: Checkpoint) -> list[str]:
    """Return the names of the layers that an adapter is on, as stored: those of the model that it was tuned in."""
    return list(dict.fromkeys(name.rpartition(".lora_")[0].removeprefix(_PREFIX) for name in file.names()))


def adapter_fingerprint(directory: Path) -> str:
    """Return the SHA-256 of all that decides what an adapter adds: its tensors and their scale."""
    settings = read_settings(directory)
    return hashlib.sha256(f"{adapter_file(directory).fingerprint()} {settings.scale!r}".encode()).hexdigest()


def read_settings(directory: Path) -> AdapterSettings:
    """Read an adapter's settings. Raises QsunError if they are not those of plain LoRA."""
    values = read_json(directory / ADAPTER_CONFIG)
    for key, plain in _PLAIN.items():
        if values.get(key, plain[0]) not in plain:
            raise QsunError(f"{directory}: {key} {values[key]!r:.60} is not plain LoRA; merge it into its base first")
    for key in ("rank_pattern", "alpha_pattern"):
        if values.get(key):
            raise QsunError(f"{directory}: {key} is not read; merge the adapter into its base first")
    rank, alpha = values.get("r"), values.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise QsunError(f"{directory / ADAPTER_CONFIG}: r {rank!r} and lora_alpha {alpha!r} are not a rank and a scale")
    return AdapterSettings(rank, alpha, bool(values.get("use_rslora")))


def merge_adapter(model: Any) -> None:
    """Replace every layer that has an adapter by one linear layer."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLinear):
            model.set_submodule(name, module.merged())


def write_adapter(adapter: Adapter, base: str, tuned: Mapping[str, Tensor], directory: Path) -> None:
    """Write an adapter, with the weights of `tuned` (by parameter name) where it has them."""
    tensors = {}
    for layer, pair in adapter.weights.items():
        for part, start in zip(_PARTS, pair, strict=True):
            value = tuned.get(f"{layer}.{part}", start)
            tensors[f"{_PREFIX}{layer}.{part}.weight"] = value.detach().float().cpu().contiguous()
    save_tensors(tensors, directory / ADAPTER_WEIGHTS)
    write_json(directory / ADAPTER_CONFIG, _config_json(tensors, adapter.settings, base))


def _config_json(names: Iterable[str], settings: AdapterSettings, base: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": int(settings.alpha) if float(settings.alpha).is_integer() else settings.alpha,
        "lora_dropout": 0.0,
        "use_rslora": settings.rslora,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted({name.split(".")[-3] for name in names}),
    }
