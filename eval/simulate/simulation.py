"""A discrete-event simulation of prefill and decode workers that serve several models.

`simulate(trace, system, curves)` replays a trace and returns every request's times. Only the choices of the
`power_of_two` policy are random, and they are seeded: the same arguments give the same times.

A request of n prompt tokens and m output tokens (split at qsun's seam):
1. It waits, first come first served, for a prefill worker of its model, which reads n - 1 tokens (`curves.prefill`).
   Without prefill workers a decode worker reads them itself (`DecodeWorker.prefill_tokens`).
2. `transfer_ms` later the policy chooses one of the decode workers that serve its model. There it waits for a place in
   the batch and for KV of n + m tokens, which it keeps to its end; nothing is evicted.
3. It joins between two steps and takes part in m of them. The first one gives its first token and attends to n tokens.

A decode worker's step takes `curves.step(variant, rows, mean context of the rows)` and `step_overhead_ms`. All tokens
of a step arrive at its end.
"""

import itertools
from collections.abc import Sequence

from qsun.errors import QsunError
from qsun.eval.load.workload import TracedRequest
from qsun.eval.simulate.curves import Curves, DoesNotFit
from qsun.eval.simulate.result import SimulationResult
from qsun.eval.simulate.run import SimulationRun
from qsun.eval.simulate.system import System


def simulate(
    trace: Sequence[TracedRequest], system: System, curves: Curves, *, warm_up: float = 0.0, seed: int = 0
) -> SimulationResult:
    """Replay a trace.

    Args:
        trace: requests in order of arrival.
        warm_up: share of the requests, from the first, that statistics leave out.
        seed: of the power_of_two policy.
    Raises:
        DoesNotFit: a request is too long for a worker of its model.
        QsunError: an empty or unordered trace, or a model that no worker serves.
    """
    if not trace:
        raise QsunError("the trace has no requests; give 1 or more")
    if any(later.arrival < earlier.arrival for earlier, later in itertools.pairwise(trace)):
        raise QsunError("the trace is not in order of arrival; sort it")
    for model in {request.model for request in trace}:
        if not any(model in worker.models for worker in system.decode):
            raise QsunError(f"no decode worker of {system.name} serves model {model!r}")
        if system.prefill and system.prefill.get(model, 0) < 1:
            raise QsunError(f"no prefill worker of {system.name} serves model {model!r}")
    for worker in system.decode:
        limit = worker.kv_tokens
        if limit is not None and worker.padded and worker.turns:
            limit //= len(worker.models)
        largest = max((r for r in trace if r.model in worker.models), key=_tokens, default=None)
        if limit is not None and largest and _tokens(largest) > limit:
            raise DoesNotFit(f"{largest} takes {_tokens(largest)} tokens of KV; a decode worker has {limit}")
    run = SimulationRun(trace, system, curves, seed)
    return SimulationResult(system, run.times, run.decode_loads(), run.prefill_loads(), warm_up)


def _tokens(request: TracedRequest) -> int:
    return request.prompt_tokens + request.output_tokens
