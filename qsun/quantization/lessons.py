"""What the quantized decode module is to learn: calibration samples, their KV, and the full-precision hidden states.

All of it is computed once, by one full-precision model after another, and kept outside the GPU.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from qsun.data.calibration import Sample
from qsun.data.examples import TokenExample
from qsun.memory import release_freed, release_sometimes
from qsun.model.skeleton import Skeleton
from qsun.quantization.activations import TOKENS_PER_BATCH
from qsun.runtime.logits import response_loss
from qsun.runtime.prefill_module import load_prefill
from qsun.runtime.seam import IGNORED, SeamBatch, collate, decode_hidden, prefill_batch

_POSITIONS = 2048  # of a lesson, those that the decode module reads


@dataclass
class Lesson:
    """A batch of samples that one prefill module reads.

    Attributes:
        kv: keys and values of the prompts by layer, (B, heads, P, head_dim) each; empty where P is 0.
        states: (B, R, hidden), what the full-precision decode module computes.
    """

    batch: SeamBatch
    module: int | None
    kv: tuple[tuple[Tensor, Tensor], ...] = ()
    states: Tensor | None = None

    @property
    def tokens(self) -> int:
        return int((self.batch.labels != IGNORED).sum())

    def cache(self, device: torch.device) -> Any:
        """Return a KV cache of the prompts, to which a decode pass may add."""
        cache = DynamicCache()
        for index, (keys, values) in enumerate(self.kv):
            cache.update(keys.to(device), values.to(device), index)
        return cache

    def loss(self, decode: Any, teacher: Any) -> Tensor:
        """Return KL(full precision || decode), summed over response tokens.

        teacher: has the full-precision lm_head, and config.
        """
        device = decode.model.embed_tokens.weight.device
        batch = self.batch.to(device)
        hidden = decode_hidden(decode, batch, self.cache(device))
        assert self.states is not None  # `teach` was called
        return response_loss(decode, hidden, batch.labels, (teacher, self.states.to(device)), 1.0)


def make_lessons(samples: Sequence[Sample]) -> list[Lesson]:
    """Put samples of like lengths, read by the same module, side by side, as many as memory should hold at once."""
    return [Lesson(collate(group), module) for module, group in _groups(samples)]


def _groups(samples: Sequence[Sample]) -> Iterator[tuple[int | None, list[TokenExample]]]:
    """Yield each lesson's module and examples. Its positions, padded, are bounded: those of decode, and all of them."""
    group: list[TokenExample] = []
    module, prompt, response = None, 0, 0
    for sample in sorted(samples, key=lambda s: (-1 if s.module is None else s.module, len(s.tokens))):
        example, rows = _example(sample), len(group) + 1
        prompt, response = max(prompt, sample.prefill_tokens), max(response, len(example.response))
        full = rows * response > _POSITIONS or rows * (prompt + response) > TOKENS_PER_BATCH
        if group and (full or sample.module != module):
            yield module, group
            group, prompt, response = [], sample.prefill_tokens, len(example.response)
        module = sample.module
        group.append(example)
    if group:
        yield module, group


def _example(sample: Sample) -> TokenExample:
    """Split a sample at the seam. Its tokens are inputs, so 0 stands for what follows the last, often EOS."""
    end = sample.prefill_tokens + 1
    return TokenExample(sample.tokens[:end], (*sample.tokens[end:], 0))


@torch.no_grad()
def teach(base: Skeleton, prefills: Sequence[str], lessons: Sequence[Lesson]) -> Any:
    """Compute the KV and states of lessons, in place.

    Args:
        base: of the full-precision model.
        prefills: directories of the prefill modules, by number.
    Returns:
        The full-precision head, as `Lesson.loss` takes it.
    """
    own = str(base.checkpoint.directory)
    for module in dict.fromkeys(lesson.module for lesson in lessons if lesson.batch.prefix.shape[1]):
        model: Any = _load(own if module is None else prefills[module], base)
        for number, lesson in enumerate((lesson for lesson in lessons if lesson.module == module), 1):
            cache = prefill_batch(model, lesson.batch.to(base.device))
            lesson.kv = tuple((layer.keys.cpu(), layer.values.cpu()) for layer in cache.layers)
            del cache
            release_sometimes(number)
        del model
        release_freed()
    model = _load(own, base)
    for number, lesson in enumerate(lessons, 1):
        lesson.states = decode_hidden(model, lesson.batch.to(base.device), lesson.cache(base.device)).cpu()
        release_sometimes(number)
    return SimpleNamespace(lm_head=model.lm_head, config=model.config)


def _load(name: str, like: Skeleton) -> Any:
    return load_prefill(name, dtype=like.dtype, device=like.device).model
