"""LoRA adapters of tiny models, and the full prefill modules that they are once merged, summed in float64."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import qsun
from qsun.model.checkpoint import Checkpoint
from qsun.runtime.quant_linear import QuantLinear

KINDS = (["q_proj", "v_proj"], ["k_proj", "o_proj", "down_proj"], ["gate_proj", "up_proj"], [])  # []: all


def write_adapter(
    directory: Path, base: Path, seed: int, rank: int = 4, targets: Any = (), decode: Path | None = None
) -> Path:
    """Write an adapter that changes answers, of a base or of a decode module's own weights.

    targets: ends of layer names; none for all of them.
    """
    model = qsun.load_decode(base, "cpu", "float32").model
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, layer in model.model.layers.named_modules(prefix="model.layers"):
        if isinstance(layer, torch.nn.Linear) and (not targets or name.rpartition(".")[2] in targets):
            at = f"base_model.model.{name}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(rank, layer.in_features, generator=random) * 0.3
            tensors[f"{at}.lora_B.weight"] = torch.randn(layer.out_features, rank, generator=random) * 0.1
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "base_model_name_or_path": str(decode or base), "r": rank, "lora_alpha": 2 * rank + 1,
        "use_rslora": bool(seed % 2), "bias": "none", "target_modules": sorted({n.split(".")[-3] for n in tensors}),
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(config))
    made = {
        "qsun_manifest": 1,
        "kind": "prefill_module",
        "base": str(base),
        "base_fingerprint": Checkpoint(base).fingerprint(),
        "fingerprint": Checkpoint(directory / "adapter_model.safetensors").fingerprint(),
    }
    if decode is not None:
        made |= {"prefill_weights": "decode", "prefill_weights_fingerprint": Checkpoint(decode).fingerprint()}
    (directory / "qsun.json").write_text(json.dumps(made))
    return directory


def merged(weights: Any, directory: Path) -> qsun.PrefillModule:
    """Return a full module: float64 sums of the weights of a model, dequantized, and of an adapter."""
    model = copy.deepcopy(weights)
    config = json.loads((directory / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    file = Checkpoint(directory / "adapter_model.safetensors")
    tensors = file.load(file.names())
    for name in [name for name, layer in model.named_modules() if isinstance(layer, (QuantLinear, torch.nn.Linear))]:
        layer = model.get_submodule(name)
        weight = layer.weight_in(torch.float32) if isinstance(layer, QuantLinear) else layer.weight
        at = f"base_model.model.{name}.lora_"
        if at + "A.weight" in tensors:
            a, b = (tensors[f"{at}{part}.weight"].double() for part in "AB")
            weight = (weight.double() + scale * b @ a).float()
        plain = torch.nn.Linear(weight.shape[1], weight.shape[0], layer.bias is not None)
        plain.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
        if layer.bias is not None:
            plain.bias = torch.nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        model.set_submodule(name, plain)
    return qsun.PrefillModule(model, directory)
