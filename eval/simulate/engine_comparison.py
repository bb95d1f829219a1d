"""The in-process engine on a trace: shared against partitioned decode, and what a simulation predicts for both.

Both systems run the same requests on the same engine code in real time, one after the other, round by round. The
simulation gets step and prefill times that were measured on this engine before each round.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from qsun.engine.config import EngineConfig, Sampling
from qsun.engine.engine import Engine
from qsun.engine.requests import Request
from qsun.errors import QsunError
from qsun.eval.load.percentiles import spread
from qsun.eval.load.workload import TracedRequest
from qsun.eval.output.table import Table
from qsun.eval.simulate.curves import SUN, Curves, StepGrid, prompt_line
from qsun.eval.simulate.simulation import simulate
from qsun.eval.simulate.system import DecodeWorker, System
from qsun.progress import Progress
from qsun.runtime.decode_module import DecodeModule
from qsun.runtime.prefill_module import PrefillModule

SHARED, PARTITIONED = "shared", "partitioned"
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_CONTEXTS = (16, 64, 128, 256, 448)
_PROMPTS = (1, 8, 32, 64, 128, 256, 448)
_TIMED = 12
_LABELS = {"tokens_per_s": "tokens/s", "tpot_ms": "mean TPOT, ms", "ttft_ms": "mean TTFT, ms"}


class EngineComparison:
    """Runs of one set of modules, measured and predicted.

    Args:
        prefills: prefill module of each model. max_batch, prefill_tokens: settings of the engine.
    """

    def __init__(
        self,
        decode: DecodeModule,
        prefills: Mapping[str, PrefillModule],
        max_batch: int = 64,
        prefill_tokens: int = 512,
    ):
        self.decode, self.prefills = decode, dict(prefills)
        self.max_batch, self.prefill_tokens = max_batch, prefill_tokens

    def engine(self, partitioned: bool = False, prefill_tokens: int = 0) -> Engine:
        """Return an engine without a prefix cache, as in the simulation."""
        turn = prefill_tokens or self.prefill_tokens
        config = EngineConfig(
            max_batch=self.max_batch,
            prefix_bytes=0,
            prefill_tokens=turn,
            max_waiting=1 << 20,
            partitioned=partitioned,
        )
        engine = Engine(self.decode, config)
        for name, module in self.prefills.items():
            engine.add_module(name, module)
        return engine

    def probe(self) -> "Probe":
        """Time whole engine steps, with their Python, by longest context and rows; and the reading of prompts."""
        contexts = [c for c in _CONTEXTS if c + 2 * _TIMED < self._positions]
        batches = [rows for rows in _BATCHES if rows <= self.max_batch]
        steps = {c: {rows: self._step_seconds(rows, c) for rows in batches} for c in contexts}
        prompts = {}
        for tokens in (n for n in _PROMPTS if n + 3 < self._positions):
            beside = [rows for rows in batches if rows == 1 or rows * tokens <= self.prefill_tokens]
            prompts[tokens] = {rows: self._prompt_seconds(rows, tokens) for rows in beside}
        return Probe(steps, prompts)

    @property
    def _positions(self) -> int:
        return self.engine().positions

    def _step_seconds(self, rows: int, context: int) -> float:
        """Time steps of rows of unequal lengths, as in use: attention may be faster if all are equal."""
        length = max(2, context - _TIMED // 2)
        engine, model = self.engine(prefill_tokens=rows * length), next(iter(self.prefills))
        for number in range(rows):
            engine.submit(_request(number, TracedRequest(0.0, model, length - number % 2, 2 * _TIMED)))
        engine.step()  # reads all prompts, as its turn is that long
        return statistics.fmean(_seconds(engine.step) for _ in range(_TIMED))

    def _prompt_seconds(self, rows: int, tokens: int) -> float:
        """Time everything that requests cost beside three decode steps: admission, reading side by side, release.

        Others decode meanwhile, as in use: weights and prompts are then not in the processor's caches.
        """
        model, turns = next(iter(self.prefills)), _TIMED // 2 + 1
        engine = self.engine(prefill_tokens=max(self.prefill_tokens, rows * tokens))
        others = min(self.max_batch - rows, self.max_batch // 2)
        for number in range(others):
            engine.submit(_request(-1 - number, TracedRequest(0.0, model, 16, 4 * turns + others)))
        while sum(state.decoding for state in engine.state.models.values()) < others:
            engine.step()
        requests = [_request(number, TracedRequest(0.0, model, tokens + 1, 3)) for number in range(rows)]

        def read() -> None:
            for request in requests:
                engine.submit(request)
            engine.step()

        beside = []
        for _ in range(turns):
            first, middle, last = (_seconds(call) for call in (read, engine.step, engine.step))
            beside.append(first + last - 2 * middle)
        return max(1e-6, statistics.fmean(beside[1:]))

    def run(self, trace: Sequence[TracedRequest], partitioned: bool) -> dict[str, Any]:
        """Run the trace in real time. Raises QsunError if a request fails."""
        engine = self.engine(partitioned)
        first: dict[int, float] = {}
        last: dict[int, float] = {}
        sent, started = 0, time.perf_counter()
        while sent < len(trace) or not engine.idle:
            now = time.perf_counter() - started
            while sent < len(trace) and trace[sent].arrival <= now:
                engine.submit(_request(sent, trace[sent]))
                sent += 1
            if engine.idle:
                time.sleep(max(0.0, trace[sent].arrival - now))
                continue
            updates = engine.step()
            now = time.perf_counter() - started
            for update in updates:
                if update.error:
                    raise QsunError(f"request {update.request} of the trace failed: {update.error}")
                first.setdefault(int(update.request), now)
                last[int(update.request)] = now
        return _summary(trace, first, last)

    def predict(self, trace: Sequence[TracedRequest], curves: Curves, partitioned: bool) -> dict[str, Any]:
        """Simulate the same run."""
        worker = DecodeWorker(
            tuple(self.prefills),
            turns=partitioned,
            max_batch=self.max_batch,
            prefill_tokens=self.prefill_tokens,
            fair=True,
            padded=True,
        )
        result = simulate(trace, System(PARTITIONED if partitioned else SHARED, (worker,)), curves)
        times = result.times
        return _summary(trace, {i: t.first for i, t in enumerate(times)}, {i: t.last for i, t in enumerate(times)})


class Probe(NamedTuple):
    """Measured seconds: of steps by longest context and rows, of reading by tokens a prompt and number of prompts."""

    steps: dict[int, dict[int, float]]
    prompts: dict[int, dict[int, float]]


def curves_of(probes: Sequence[Probe]) -> Curves:
    """Return the means of all rounds' probes: the length of a run is the sum of its steps, slow ones included."""
    steps = StepGrid(_means([probe.steps for probe in probes]))
    prompts = _means([probe.prompts for probe in probes])

    def step(_: str, rows: int, context: float) -> float:
        return steps.at(rows, context)

    return Curves(
        step,
        prompt_line({tokens: by_rows[1] for tokens, by_rows in prompts.items()}),
        "measured on this engine, before each round",
        {SUN: steps.largest},
        group=StepGrid(prompts).at,
    )


def _means(tables: Sequence[dict[int, dict[int, float]]]) -> dict[int, dict[int, float]]:
    return {a: {b: statistics.fmean(t[a][b] for t in tables) for b in row} for a, row in tables[0].items()}


def check_trace(trace: Sequence[TracedRequest]) -> None:
    """Raise QsunError for a trace without a request of several tokens: there is no TPOT to compare."""
    if all(request.output_tokens == 1 for request in trace):
        raise QsunError(
            "all requests have 1 output token, so there is no TPOT; use a longer --output, such as fixed:16"
        )


def compare_in_rounds(
    runs: EngineComparison, trace: Sequence[TracedRequest], rounds: int, progress: Progress
) -> dict[str, Any]:
    """Run rounds of step times and of both systems, after a warm-up of each.

    Returns:
        Medians over rounds, each round's ratio and the prediction, by system.
    """
    probes: list[Probe] = []
    measured: dict[str, list[dict[str, Any]]] = {SHARED: [], PARTITIONED: []}
    for number, name in enumerate(measured):
        progress("warm-up", number, 3 * rounds + 2)
        runs.run(trace, name == PARTITIONED)
    for number in range(rounds):
        progress("step times", 3 * number + 2, 3 * rounds + 2)
        probes.append(runs.probe())
        order = (SHARED, PARTITIONED) if number % 2 == 0 else (PARTITIONED, SHARED)
        for place, name in enumerate(order):
            progress(name, 3 * number + place + 3, 3 * rounds + 2)
            measured[name].append(runs.run(trace, name == PARTITIONED))
    curves = curves_of(probes)
    result: dict[str, Any] = {"requests": len(trace), "rounds": rounds, "systems": {}}
    for name, each in measured.items():
        predicted = runs.predict(trace, curves, name == PARTITIONED)
        middle = {key: statistics.median(one[key] for one in each) for key in _LABELS}
        result["systems"][name] = {
            "measured": middle,
            "rounds": each,
            "predicted": {key: predicted[key] for key in middle},
            "predicted_over_measured": {key: predicted[key] / middle[key] for key in middle},
        }
    pairs = list(zip(measured[SHARED], measured[PARTITIONED], strict=True))
    result["shared_over_partitioned"] = {key: [ours[key] / theirs[key] for ours, theirs in pairs] for key in _LABELS}
    progress("done", 3 * rounds + 2, 3 * rounds + 2)
    return result


def report_text(result: Mapping[str, Any]) -> str:
    """Return lines for a terminal."""
    rows = []
    for name, one in result["systems"].items():
        measured, predicted, off = one["measured"], one["predicted"], one["predicted_over_measured"]
        errors = [f"{predicted[key]:.4g} ({100 * (off[key] - 1):+.0f}%)" for key in _LABELS]
        rows.append([name, *(f"{measured[key]:.4g}" for key in _LABELS), *errors])
    columns = ["decode", *_LABELS.values(), *(f"predicted {label}" for label in _LABELS.values())]
    ratios = result["shared_over_partitioned"]
    by_round = [
        f"shared over partitioned, {label}, by round: " + ", ".join(f"{ratio:.2f}" for ratio in ratios[key])
        for key, label in _LABELS.items()
    ]
    return "\n".join([Table(columns, rows).text(), *by_round])


def _summary(trace: Sequence[TracedRequest], first: Mapping[int, float], last: Mapping[int, float]) -> dict[str, Any]:
    tokens = sum(request.output_tokens for request in trace)
    ttfts = [1000 * (first[i] - request.arrival) for i, request in enumerate(trace)]
    tpots = [
        1000 * (last[i] - first[i]) / (request.output_tokens - 1)
        for i, request in enumerate(trace)
        if request.output_tokens > 1
    ]
    return {
        "tokens_per_s": tokens / (max(last.values()) - trace[0].arrival),
        "tpot_ms": statistics.fmean(tpots),
        "ttft_ms": statistics.fmean(ttfts),
        "tpot_spread_ms": spread(tpots),
        "ttft_spread_ms": spread(ttfts),
    }


def _request(number: int, request: TracedRequest) -> Request:
    """Return a request with tokens of its own; what they mean does not affect the time."""
    tokens = tuple(3 + (number * 7 + place * 13) % 100 for place in range(request.prompt_tokens))
    sampling = Sampling(max_new_tokens=request.output_tokens, ignore_eos=True)
    return Request(str(number), request.model, tokens, sampling)


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
