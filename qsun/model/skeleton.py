"""A model without its weights, whose blocks are loaded one at a time, and what it passes to each block.

transformers' own classes compute everything: the skeleton is the real model on the meta device, and the arguments of a
block (masks, rotary embeddings, per layer type) are what the model's own forward hands to it, recorded by stand-ins.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, __version__
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qsun.errors import QsunError, shortened
from qsun.model.architectures import ARCHITECTURES, TEXT_MODELS, Architecture, architecture_of, block_prefix
from qsun.model.checkpoint import Checkpoint, read_json

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


class Skeleton:
    """The model of a directory, without weights but for what is loaded on demand.

    Attributes:
        config: transformers' config. model: the causal LM on the meta device (its buffers are real).
        architecture: the table's row. base_dtype: what the weights are stored in.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device):
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self.config = read_model_config(checkpoint.directory)
        self.base_dtype = (checkpoint.dtype(EMBEDDING) if EMBEDDING in checkpoint else None) or torch.float32
        self.architecture: Architecture = architecture_of(self.config.model_type)
        self.model: Any = empty_model(self.config)
        self.layers: nn.ModuleList = self.model.model.layers
        self._shape: tuple[int, int] | None = None
        self._arguments: list[dict[str, Any]] = []  # of all blocks for this shape only: masks are large

    @property
    def tied(self) -> bool:
        return bool(self.config.tie_word_embeddings)

    def linear_shapes(self, with_head: bool) -> dict[str, tuple[int, int]]:
        """Return (out_features, in_features) of each linear layer that can be quantized, by full name."""
        names = self.architecture.all_linear_names(len(self.layers)) + (["lm_head"] if with_head else [])
        return {name: weight_shape(self.model, name) for name in names}

    def load_block(self, index: int) -> nn.Module:
        """Return a block with its weights in the computation's dtype. Raises QsunError for NaN or Inf."""
        prefix = block_prefix(index)
        tensors = self.checkpoint.load(self.checkpoint.names(prefix))
        return self.fill(self.layers[index], {name.removeprefix(prefix): t for name, t in tensors.items()}, prefix)

    def fill(self, module: nn.Module, tensors: Mapping[str, Tensor], prefix: str = "") -> nn.Module:
        """Return a copy of a skeleton module that holds these tensors."""
        filled = copy.deepcopy(module)
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise QsunError(
                    f"{prefix}{name} has NaN or Inf; the model is damaged, or overflowed when it was converted"
                )
        cast = {n: t.to(self.device, self.dtype) if t.is_floating_point() else t for n, t in tensors.items()}
        try:
            filled.load_state_dict(cast, strict=True, assign=True)
        except RuntimeError as error:
            raise QsunError(f"{prefix}*: {shortened(error, 300)}") from None
        return filled.to(self.device).eval().requires_grad_(False)

    def embed(self, batches: list[Tensor]) -> list[Tensor]:
        """Return what enters block 0 for each batch of token ids."""
        inner = self.model.model
        tensors = self.checkpoint.load([EMBEDDING])
        meta, inner.embed_tokens = inner.embed_tokens, self.fill(inner.embed_tokens, {"weight": tensors[EMBEDDING]})
        try:
            return [self._record(ids=ids)[0] for ids in batches]
        finally:
            inner.embed_tokens = meta

    def block_arguments(self, index: int, hidden: Tensor) -> dict[str, Any]:
        """Return the keyword arguments that the model passes to this block for unpadded input of this shape."""
        shape = (hidden.shape[0], hidden.shape[1])
        if shape != self._shape:
            self._arguments, self._shape = [], None
            self._arguments = self._record(embeds=hidden)[1]
            self._shape = shape
        return self._arguments[index]

    def _record(self, ids: Tensor | None = None, embeds: Tensor | None = None) -> tuple[Tensor, list[dict[str, Any]]]:
        inner = self.model.model
        recorders = [_Recorder(layer) for layer in self.layers]
        norm = inner.norm
        inner.layers, inner.norm = nn.ModuleList(recorders), nn.Identity()
        try:
            inner(input_ids=ids, inputs_embeds=embeds, use_cache=False)
        finally:
            inner.layers, inner.norm = self.layers, norm
        return recorders[0].hidden, [recorder.arguments for recorder in recorders]

    def final_norm(self) -> nn.Module:
        names = self.checkpoint.names("model.norm.")
        tensors = {n.removeprefix("model.norm."): t for n, t in self.checkpoint.load(names).items()}
        return self.fill(self.model.model.norm, tensors, "model.norm.")

    def head(self) -> nn.Module:
        """Return the output projection, from the embedding if they are tied."""
        stored = EMBEDDING if self.tied and HEAD not in self.checkpoint else HEAD
        return self.fill(self.model.lm_head, {"weight": self.checkpoint.load([stored])[stored]}, "lm_head.")


def linear_of(module: nn.Module, name: str) -> nn.Linear:
    """Return the linear layer of this name inside a module."""
    return cast(nn.Linear, module.get_submodule(name))


def plain_linear(weight: Tensor, bias: Tensor | None, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    """Return a frozen linear layer of these weights (out, in)."""
    linear = kind(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def weight_shape(module: nn.Module, name: str) -> tuple[int, int]:
    """Return (out_features, in_features) of the linear layer of this name."""
    linear = linear_of(module, name)
    return linear.out_features, linear.in_features


class _Recorder(nn.Module):
    """Stands in for a block: notes what it is called with and passes the hidden states on."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)  # read by some models' forward

    def forward(self, hidden_states: Tensor, *args: Any, **arguments: Any) -> Tensor:
        self.hidden = hidden_states
        self.arguments = arguments
        return hidden_states


def read_model_config(directory: Path) -> Any:
    """Return transformers' config of a directory's causal language model, without a quantization_config.

    Of a multimodal model that is its text model. Embeddings that are tied in the file but not in the weights are not
    tied, which is how transformers loads them.
    """
    values = _text_values(directory) or read_json(directory / "config.json")
    if not isinstance(values.get("model_type"), str):
        raise QsunError(f"{directory / 'config.json'} names no model_type")
    architecture_of(values["model_type"])
    config = _within_a_chunk(_parsed(values, directory), directory)
    if config.tie_word_embeddings and _has_another_head(directory):
        config.tie_word_embeddings = False
    return config


def _within_a_chunk(config: Any, directory: Path) -> Any:
    """Limit Llama 4 to positions whose attention is plain: those of one chunk, all with the same temperature.

    Raises QsunError if it has layers of experts.
    """
    if getattr(config, "moe_layers", None):
        raise QsunError(f"{directory} has mixtures of experts (moe_layers), which are not supported yet")
    limits = [config.max_position_embeddings]
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        limits.append(config.attention_chunk_size)
    if getattr(config, "attn_temperature_tuning", False):
        limits.append(config.floor_scale - 1)  # below, it is 1; it goes by columns, which padding shifts
        config.attn_temperature_tuning = False
    config.max_position_embeddings = min(limits)
    return config


def _parsed(values: Mapping[str, Any], directory: Path) -> Any:
    try:
        return AutoConfig.for_model(**{key: value for key, value in values.items() if key != "quantization_config"})
    except Exception as error:  # each config class checks in its own way, down to those of a strict dataclass
        raise QsunError(f"{directory / 'config.json'}: {shortened(error, 300)}") from None


def _text_values(directory: Path) -> dict[str, Any] | None:
    """Return the config of the text model inside a multimodal model; None for every other model."""
    values = read_json(directory / "config.json")
    if values.get("model_type") in ARCHITECTURES or not ("text_config" in values or "vision_config" in values):
        return None
    whole = _parsed(values, directory)
    text = whole.get_text_config(decoder=True)
    model_type = TEXT_MODELS.get(text.model_type, text.model_type)
    if text is whole or model_type not in ARCHITECTURES:
        return None
    found: dict[str, Any] = text.to_dict() | {"model_type": model_type}
    found["dtype"] = values.get("dtype") or values.get("torch_dtype")
    found["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
    found["tie_word_embeddings"] = bool(whole.tie_word_embeddings)
    if model_type != text.model_type:  # the positions of text are plain
        found["rope_parameters"] = {k: v for k, v in found["rope_parameters"].items() if not k.startswith("mrope")}
    return found


def _has_another_head(directory: Path) -> bool:
    try:
        checkpoint = Checkpoint(directory)
    except QsunError:
        return False  # an adapter, or what reading the weights will name
    if EMBEDDING not in checkpoint or not checkpoint.names("lm_head."):
        return False
    return HEAD not in checkpoint or not checkpoint.same(HEAD, EMBEDDING)  # not there: it is stored as integers


def empty_model(config: Any) -> Any:
    """Return the causal LM with parameters on the meta device and real buffers.

    Raises QsunError where transformers cannot build it, such as for an activation or a kind of RoPE that it lacks.
    """
    # transformers' fused attention ignores Gemma 2's soft cap on the logits.
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
    with init_empty_weights(include_buffers=False):
        # Buffers in float32: a scale that is rounded to the checkpoint's dtype stays rounded in every other.
        try:
            return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
        except Exception as error:  # models look values up that their config classes do not check
            raise QsunError(
                f"transformers {__version__} cannot build the {config.model_type} model of config.json: "
                f"{type(error).__name__}: {shortened(error, 200)}; correct that value, or use a later transformers"
            ) from None


def config_json(directory: Path) -> dict[str, Any]:
    """Return config.json of the causal language model, to be written beside its weights."""
    values = _text_values(directory) or read_json(directory / "config.json")
    untied = _parsed(values, directory).tie_word_embeddings and not read_model_config(directory).tie_word_embeddings
    return values | ({"tie_word_embeddings": False} if untied else {})
