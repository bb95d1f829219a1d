"""What polish needs in memory, from the sizes of a model and of the lessons; checked against measured peaks.

Two whole models come one after the other. First the full-precision base, which reads all lessons; then the decode
module, a byte a weight, with what a step keeps for its gradients. What the base taught stays, outside the GPU.
"""

from dataclasses import dataclass

from qsun.config import LayerSpec
from qsun.data.calibration import Calibration
from qsun.model.architectures import ATTENTION_END, MLP_END, block_prefix, kv_shape
from qsun.model.skeleton import EMBEDDING, Skeleton
from qsun.quantization.lessons import Lesson, make_lessons
from qsun.runtime.logits import PIECE_BYTES

_SCALE_BYTES = 25  # of a scale: itself, its zero point, its gain and the best one, a gradient and Adam's two moments
_DENSE_COPIES = 4  # of the largest layer in float32, in its backward pass
_LOGIT_PIECES = 5  # of both models' logits, their log-softmax and a gradient


def polish_bytes(skeleton: Skeleton, specs: dict[str, LayerSpec], calibration: Calibration) -> tuple[int, int]:
    """Estimate the peaks of polish in RAM and in a GPU's memory, in bytes; the latter is 0 on a CPU."""
    lessons = make_lessons(calibration.samples) + make_lessons(calibration.held_out)
    sizes, item = _Sizes.of(skeleton), skeleton.dtype.itemsize
    shapes = skeleton.linear_shapes(False)
    head = sizes.vocabulary * sizes.hidden * (1 if skeleton.tied else 2)
    base = (sum(N * K for N, K in shapes.values()) + head) * item
    stored = skeleton.checkpoint.size_bytes(skeleton.checkpoint.names())
    decode = (head + sizes.vocabulary * sizes.hidden) * item  # with the base's head, for its distributions
    for name, (N, K) in shapes.items():
        spec = specs[name]
        groups = 1 if spec.group_size == -1 else K // spec.group_size
        decode += N * K + _SCALE_BYTES * N * groups if spec.quantized else N * K * item
    decode += _DENSE_COPIES * 4 * max(N * K for N, K in shapes.values())
    kv = [sizes.kv(lesson) for lesson in lessons]
    taught = sum(kv) + sum(lesson.batch.rest.numel() for lesson in lessons) * sizes.hidden * item
    teach, step = max(map(sizes.teach, lessons)), max(map(sizes.step, lessons))
    if skeleton.device.type == "cuda":
        return taught + stored, max(base + max(kv) + teach, decode + step)
    loading = base + sum(kv) + (stored if skeleton.dtype != skeleton.base_dtype else 0)
    return max(loading, base + taught + teach, decode + taught + step), 0


@dataclass(frozen=True)
class _Sizes:
    """Of a model: mlp and attention are the inputs of down_proj and o_proj, kv_width those of K of all heads."""

    layers: int
    hidden: int
    mlp: int
    attention: int
    heads: int
    kv_width: int
    vocabulary: int
    item: int
    eager: bool

    @classmethod
    def of(cls, skeleton: Skeleton) -> "_Sizes":
        config, shapes, stages = skeleton.config, skeleton.linear_shapes(False), skeleton.architecture.stages
        layers, kv_heads, width = kv_shape(config)
        attention, mlp = (shapes[block_prefix(0) + stages[end].layers[0]][1] for end in (ATTENTION_END, MLP_END))
        vocabulary, hidden = skeleton.checkpoint.shape(EMBEDDING)
        eager = skeleton.model.config._attn_implementation == "eager"
        return cls(
            layers, hidden, mlp, attention, config.num_attention_heads, kv_heads * width, vocabulary,
            skeleton.dtype.itemsize, eager,
        )  # fmt: skip

    def kv(self, lesson: Lesson) -> int:
        """Return the bytes of the prompts' keys and values."""
        return 2 * self.layers * lesson.batch.prefix.numel() * self.kv_width * self.item

    def teach(self, lesson: Lesson) -> int:
        """Return what a forward pass takes at its widest layer, besides the KV."""
        (rows, P), R = lesson.batch.prefix.shape, lesson.batch.rest.shape[1]
        activations = rows * max(P, R) * (3 * self.mlp + 4 * self.hidden) * self.item
        return activations + self._masks(rows, P, P, 1) + rows * P * P

    def step(self, lesson: Lesson) -> int:
        """Return what a step keeps of all layers: KV, activations, attention, and the logits of a piece."""
        (rows, P), R = lesson.batch.prefix.shape, lesson.batch.rest.shape[1]
        kv = (2 + self.attention // self.kv_width) * self.kv(lesson)
        activations = self.layers * rows * R * (4 * self.mlp + 7 * self.hidden + 4 * self.attention) * self.item
        logits = _LOGIT_PIECES * min(PIECE_BYTES, 4 * self.vocabulary * rows * R)
        return kv + activations + self._masks(rows, R, P + R, self.layers) + logits

    def _masks(self, rows: int, queries: int, keys: int, layers: int) -> int:
        """Return the bytes of attention's masks; where it is eager, of its float32 scores as well."""
        return rows * queries * keys * layers * (8 * self.heads if self.eager else self.item)
