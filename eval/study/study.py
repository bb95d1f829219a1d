"""`qsun bench tasks`: what SUN, and then QSUN, cost in accuracy against full fine-tuning.

    try rates -> tune (SUN, full, adapters; by seed, task and budget) -> quantize (method, bits, calibration)
        -> align -> distill; each is scored as soon as it is there

Every step leaves a directory or a file and is skipped if that exists, so that a stopped study can be resumed, and a
larger one adds only what is missing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qsun.config import QuantConfig
from qsun.errors import QsunError
from qsun.eval.study.task import EMBEDDED, StudyTask


@dataclass(frozen=True)
class Study:
    """What a study consists of; `steps` is the budget of SUN and of the full fine-tune alike.

    Attributes:
        base: full-precision base: directory, hub id or "demo".
        seeds: their number, from first_seed on; each has its own order and calibration and, for embedded tasks, data.
        curve: smaller budgets, for accuracy by steps; complete runs of their own, of the first seed only.
        align_steps: further steps of each prefill module against a quantized decode module and, as a control, against
            the full-precision one; 0: none. align_share: their peak rate, of that of the steps before.
        distill: take further steps on the distributions of the SUN pair too.
        lora_ranks: of adapters, tuned on the base's weights and on each quantized decode module's.
        text: calibrate every decode module with the packaged text too.
        lr, full_lr, lora_lr: peak rates of prefill modules, full fine-tunes, adapters, chosen on validation data; 0: by
            width. Of adapters, one for each rank, or one for all; none: as tried, without `rates` by width.
        rates: peak rates to try in place of lr and full_lr, and of lora_lr where there is none, with the first seed:
            each kind of module (sun, full, adapters by rank) of each task takes the one with the least validation loss
            after rate_steps steps; 0: a quarter of `steps`.
        valid: validation examples of every tuning.
        train: examples drawn of an embedded task. test: those scored; 0: of a file all, of an embedded task 500.
        bits, methods, group_size, sym: of the decode modules. The last calibrated method, or `refined`, is aligned.
        samples, polish: calibration sequences of each decode module, and steps of polish of calibrated ones.
        dtype, device: of all modules, as in qsun tune.
    """

    base: str = "demo"
    tasks: tuple[StudyTask, ...] = EMBEDDED
    seeds: int = 3
    first_seed: int = 0
    steps: int = 1000
    curve: tuple[int, ...] = (125, 250, 500)
    align_steps: int = 250
    align_share: float = 1.0
    distill: bool = False
    lora_ranks: tuple[int, ...] = ()
    text: bool = True
    batch_size: int = 32
    lr: float = 3e-3
    full_lr: float = 3e-3
    lora_lr: tuple[float, ...] = ()
    rates: tuple[float, ...] = ()
    rate_steps: int = 0
    train: int = 8192
    test: int = 0
    valid: int = 256
    bits: tuple[int, ...] = (4, 3, 2)
    methods: tuple[str, ...] = ("rtn", "awq", "gptq", "refined")
    group_size: int = 32
    sym: bool = False
    samples: int = 128
    polish: int = 0
    dtype: str = "auto"
    device: str = "cpu"

    def __post_init__(self) -> None:
        for method in self.methods:
            for bits in self.bits:
                self.quant_config(method, bits, 0)  # validates them
        if not any(method != "rtn" for method in self.methods):
            raise QsunError(f"methods {', '.join(self.methods)} use no calibration; add one, such as refined")
        for name, values in (("curve", self.curve), ("lora_ranks", self.lora_ranks)):
            if any(value < 1 for value in values):
                raise QsunError(f"{name} has {min(values)}; use whole numbers from 1 up")
        for name in ("bits", "methods", "lora_ranks"):  # each has one place of its own
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise QsunError(f"{name} {', '.join(map(str, given))} contain a duplicate; give each once")
        if self.lora_lr and len(self.lora_lr) not in {1, len(self.lora_ranks)}:
            counts = f"{len(self.lora_lr)} rates for {len(self.lora_ranks)} adapter ranks"
            raise QsunError(f"lora_lr has {counts}; give one, or one for each")
        of_adapters = all(self.lora_lr) and (self.lora_lr or self.rates) if self.lora_ranks else True
        if self.align_share != 1 and not ((self.lr or self.rates) and of_adapters):
            raise QsunError(f"align_share {self.align_share:g} is a share of lr and lora_lr; give them, or rates")
        if any(rate <= 0 for rate in self.rates) or len(set(self.rates)) < len(self.rates):
            shown = ", ".join(f"{rate:g}" for rate in self.rates)
            raise QsunError(f"rates {shown} must be different numbers above 0")
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise QsunError(f"tasks {', '.join(names)} contain a duplicate; give each its own name")
        if not any(not task.hard for task in self.tasks):
            raise QsunError("a study needs a task; give --task NAME=TRAIN,VALID,TEST")

    @property
    def lora_rates(self) -> dict[int, float]:
        """Return the peak rate of each adapter rank; 0: by width."""
        return rates_by_rank(self.lora_ranks, self.lora_lr)

    @property
    def all_seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)

    @property
    def aligned_method(self) -> str:
        return aligned_method(self.methods)

    def quant_config(self, method: str, bits: int, seed: int) -> QuantConfig:
        grid = {"method": method, "bits": bits, "group_size": self.group_size, "sym": self.sym}
        chosen = QuantConfig.from_dict(grid | {"samples": self.samples, "seed": seed, "dtype": self.dtype})
        return chosen.replace(polish=self.polish) if chosen.calibrated else chosen

    def served(self) -> list[str]:
        """Return the names of the tasks that decode modules are calibrated for."""
        return [task.name for task in self.tasks if not task.hard]

    def tasks_of(self, seed: int) -> list[StudyTask]:
        """Return the served tasks and, with the first seed, those that break a frozen decoder."""
        return [task for task in self.tasks if seed == self.first_seed or not task.hard]

    def module(self, out: Path, seed: int, task: str, name: str) -> Path:
        """Return the place of a tuned module; name: as in modules.py."""
        return out / f"seed{seed}" / task / name

    def decoder(self, out: Path, seed: int | None, method: str, bits: int) -> Path:
        """Return the place of a decode module; seed None: calibrated with the packaged text, once for all seeds."""
        return out / ("text" if seed is None else f"seed{seed}") / f"decode-{method}-int{bits}"

    def answers(self, out: Path, seed: int, task: str, variant: str) -> Path:
        """Return the place of a variant's answers: a JSON string with a digit, 1 for right, for each test example."""
        return out / f"seed{seed}" / task / "answers" / f"{variant.replace(',', '').replace(' ', '-')}.json"


def rates_by_rank(ranks: Sequence[int], rates: Sequence[float]) -> dict[int, float]:
    """Return the rate of each rank, of one for all or one for each; none: 0."""
    return dict(zip(ranks, rates if len(rates) > 1 else [*rates, 0.0][:1] * len(ranks), strict=True))


def aligned_method(methods: Sequence[str]) -> str:
    """Return the method whose decode modules prefill modules are aligned with."""
    return "refined" if "refined" in methods else [method for method in methods if method != "rtn"][-1]
