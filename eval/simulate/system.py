"""A simulated system: decode and prefill workers, and the policy that routes between them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from qsun.errors import QsunError
from qsun.eval.simulate.curves import SUN

LEAST, POWER_OF_TWO, ROUND_ROBIN = "least_outstanding_tokens", "power_of_two", "round_robin"
POLICIES = (LEAST, POWER_OF_TWO, ROUND_ROBIN)


@dataclass(frozen=True)
class DecodeWorker:
    """One decode worker: a GPU, or the thread of an in-process engine.

    Attributes:
        variant: step curve of its decode modules.
        models: models that it serves.
        turns: one batch a model, because each has its own decode module; a step then runs the batches one after the
            other. Otherwise one batch holds rows of all models: the shared decode module.
        max_batch: rows at once of all models together, including those whose prompt is being read.
        kv_tokens: prompt and output tokens of its rows at once.
        prefill_tokens: 0 if prompts are read elsewhere. Otherwise this worker reads them itself, as qsun's in-process
            engine does: a step first reads up to this many prompt tokens, and then decodes all running rows, including
            those whose prompt it has just completed. Whole prompts of one model are read side by side.
        fair: admit waiting requests of the least served model first, instead of in order of arrival.
        padded: every row of a step attends to as many tokens as the longest row has, as in the in-process engine;
            `curves.step` gets the longest context instead of the mean, and each row takes as much of `kv_tokens` as the
            longest one needs. With `turns` each batch has an equal share of them.
    """

    models: tuple[str, ...]
    variant: str = SUN
    turns: bool = False
    max_batch: int = 64
    kv_tokens: int | None = None
    prefill_tokens: int = 0
    fair: bool = False
    padded: bool = False


@dataclass(frozen=True)
class System:
    """Workers and how requests get from one to the next.

    Attributes:
        prefill: model -> its prefill workers; empty if decode workers read prompts themselves.
        policy: of the router, among the decode workers that serve the model: the least outstanding tokens (prompt and
            output of requests sent there and not finished), the lesser of two random workers, or round robin by model.
        transfer_ms: from the end of a prefill until its KV is at the decode worker; neither of them is busy meanwhile.
        step_overhead_ms: added to each step of a decode worker.
    """

    name: str
    decode: tuple[DecodeWorker, ...]
    prefill: Mapping[str, int] = field(default_factory=dict)
    policy: str = LEAST
    transfer_ms: float = 0.0
    step_overhead_ms: float = 0.0

    def __post_init__(self) -> None:
        if not self.decode:
            raise QsunError(f"system {self.name} has no decode workers; give 1 or more")
        if self.policy not in POLICIES:
            raise QsunError(f"policy {self.policy!r} is not known; use one of {', '.join(POLICIES)}")
        for name, milliseconds in (("transfer_ms", self.transfer_ms), ("overhead_ms", self.step_overhead_ms)):
            if not 0 <= milliseconds < math.inf:
                raise QsunError(f"{name} {milliseconds:g} is out of range; use 0 or more milliseconds")
        for worker in self.decode:
            sizes = (worker.max_batch, worker.kv_tokens or 1)
            if min(sizes) < 1:
                raise QsunError(f"system {self.name}: a decode worker with a limit of {min(sizes)}; use 1 or more")
            if not self.prefill and worker.prefill_tokens < 1:
                raise QsunError(
                    f"system {self.name} has no worker to read prompts; give prefill ones or prefill_tokens"
                )

    @property
    def workers(self) -> int:
        return len(self.decode) + sum(self.prefill.values())
