"""The quantization method `qsun` in vLLM: which layers it computes, and what it accepts."""

from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.models.utils import WeightsMapper

from qsun.memory import available_bytes
from qsun.model.checkpoint import Checkpoint
from qsun.model.locate import find_model
from qsun.model.quantization_config import stored_format
from qsun.vllm.linear import QsunHeadMethod, QsunLinearMethod
from qsun.vllm.stored import StoredLayers

METHOD = "qsun"


@register_quantization_config(METHOD)
class QsunConfig(QuantizationConfig):
    """A decode module in any of the formats that qsun writes, on our kernels.

    config.json gives only the format; which layers are quantized, and how, is read from the module's tensors.
    """

    def __init__(self, fmt: str):
        super().__init__()
        self.fmt = fmt
        self.stored: StoredLayers | None = None
        self.keep_dense = False

    def get_name(self) -> Any:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "QsunConfig":
        return cls(stored_format(config))

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None) -> Any:
        """Return our name if the user chose it with `--quantization qsun`."""
        return METHOD if user_quant == METHOD else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read the stored layers. vLLM calls this once with the model's directory or hub id, before it makes layers."""
        self.stored = StoredLayers.of(Checkpoint(find_model(model_name)), self.fmt)
        self.keep_dense = self.stored.dense_bytes() < available_bytes() / 2

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Map no names: unlike vLLM's own methods, ours reads g_idx."""
        return WeightsMapper()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        head = isinstance(layer, ParallelLMHead)
        if not head and not isinstance(layer, LinearBase):
            return None
        assert self.stored is not None, "vLLM did not call maybe_update_config"
        parts = self.stored.parts(prefix, self.packed_modules_mapping)
        if not parts:
            return UnquantizedEmbeddingMethod() if head else UnquantizedLinearMethod()
        method = QsunHeadMethod if head else QsunLinearMethod
        return method(self.stored, parts, self.keep_dense)
