"""The sections of cluster.yaml: which workers serve which modules, how requests are distributed, and every limit.

    listen: {host: 127.0.0.1, port: 8000}
    decode: {module: out/demo-int4, workers: [http://127.0.0.1:8201, http://127.0.0.1:8202]}
    models:
      math: {module: out/math, workers: [http://127.0.0.1:8101]}

LoRA adapters share one pool of prefill workers, which have the weights that they were tuned on:

    prefill: {module: base, workers: [http://127.0.0.1:8111]}
    models:
      math: {adapter: out/math}

Adapters on the decode module's own weights need no transfer: without `prefill`, each decode worker is one engine that
reads their prompts itself (`qsun up` only).

A number instead of a list of workers is for `qsun up`, which starts that many as replicas on Ray.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, model_validator

from qsun.config import Dtype, Section, Settings
from qsun.serve.http.guard import GuardConfig

PolicyName = Literal["least_outstanding_tokens", "power_of_two", "round_robin", "partitioned"]
PrefillPolicyName = Literal["least_outstanding_tokens", "power_of_two", "round_robin", "prefix_affinity"]
Count = Annotated[int, Field(ge=1, le=1 << 40)]
Seconds = Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)]
Names = Annotated[tuple[str, ...], Field(strict=False)]  # YAML has lists
_MOST_WORKERS = 1024


def _worker_url(value: object) -> str:
    text = str(value).rstrip("/")
    try:
        parts = urlsplit(text)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        sound = False
    if not sound or parts.path or parts.query or parts.fragment or parts.username or len(text) > 300:
        raise ValueError("use http://host:port or https://host:port, without path, query or user")
    return text.lower()


def _worker_entries(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST_WORKERS:
        return value
    if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= _MOST_WORKERS:
        raise ValueError("use a list of URLs, or for `qsun up` the number of workers to start")
    return [{"url": entry} if isinstance(entry, str) else entry for entry in value]


class WorkerEntry(Section):
    """A running vLLM worker. `models` assigns a decode worker under the policy `partitioned`."""

    url: Annotated[str, BeforeValidator(_worker_url)]
    models: Names | None = None


Entries = Annotated[tuple[WorkerEntry, ...], Field(strict=False)]
Workers = Annotated[Entries | int, BeforeValidator(_worker_entries)]


class Scale(Section):
    """How far Ray may raise the number of a pool's workers, which is also the least number.

    Attributes:
        workers: at most.
        tokens: outstanding tokens for each worker (see `policy`): with twice as many there are to be two.
        up_seconds, down_seconds: for which more, or fewer, must be wanted.
    """

    workers: Annotated[int, Field(ge=1, le=_MOST_WORKERS)]
    tokens: Count
    up_seconds: Seconds = 10.0
    down_seconds: Seconds = 120.0


class Pool(Section):
    """A module, and the workers that serve it.

    Attributes:
        module: its directory, absolute after `read_cluster`, or "demo".
        workers: running ones, or how many `qsun up` is to start.
        scale: None: the number stays.
    """

    module: str
    workers: Workers
    scale: Scale | None = None

    @property
    def urls(self) -> tuple[str, ...]:
        """URLs of the running workers; empty for a number."""
        return () if isinstance(self.workers, int) else tuple(worker.url for worker in self.workers)


class Model(Pool):
    """A model of the router's API: a full prefill module with workers of its own, or a LoRA adapter.

    Attributes:
        adapter: its directory, absolute after `read_cluster`; the workers of the cluster's `prefill` serve it, or
            without them those of `decode`.
    """

    module: str = ""
    workers: Workers = ()
    adapter: str = ""

    @model_validator(mode="before")
    @classmethod
    def _one_kind(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not values.get("adapter"):
            missing = [key for key in ("module", "workers") if isinstance(values, dict) and key not in values]
            if missing:
                raise ValueError(f"{missing[0]} is missing; give module and workers, or adapter")
            return values
        own = [key for key in ("module", "workers", "scale") if values.get(key)]
        if own:
            raise ValueError(f"adapter and {own[0]} exclude each other: the workers of `prefill` serve adapters")
        return {"adapter": values["adapter"]}


class Listen(Section):
    """Attributes:
    api_keys: file of API keys, one per line.
    without_keys: serve without keys on an address that other machines can reach.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_keys: Annotated[Path, Field(strict=False)] | None = None
    without_keys: bool = False


class RequestLimits(Section):
    """Limits of every request, and of the queue.

    Attributes:
        body_bytes, prompt_tokens, max_tokens: of one request; 4 characters of text count as a token.
        concurrent_requests: running at once; queued_requests wait for at most queue_seconds, and more get 429.
        deadline_seconds: from a request's arrival to its last byte.
        prefill_seconds: of one attempt at a prefill worker; of a stream of an engine that answers alone, until its
            first token.
        stall_seconds: between two pieces of a stream.
        gather_seconds: events of a stream within this time of the last ones sent are sent together; 0: each by
            itself.
        attempts: times that a request starts from prefill.
        no_worker_seconds: that a request waits for a usable pair of workers.
        drain_seconds: after SIGTERM, for running requests.
    """

    body_bytes: Count = 1 << 20
    prompt_tokens: Count = 1 << 17
    max_tokens: Count = 1 << 14
    concurrent_requests: Count = 256
    queued_requests: Annotated[int, Field(ge=0)] = 256
    queue_seconds: Seconds = 30.0
    deadline_seconds: Seconds = 600.0
    prefill_seconds: Seconds = 120.0
    stall_seconds: Seconds = 60.0
    gather_seconds: Annotated[float, Field(ge=0, le=1)] = 0.0
    attempts: Annotated[int, Field(ge=1, le=20)] = 4
    no_worker_seconds: Seconds = 10.0
    drain_seconds: Seconds = 30.0


class Health(Section):
    """Background checks, circuit breaker, warm-up.

    Attributes:
        failures: in a row, which open a worker's circuit; after cool_down_seconds it is probed.
        warm_up_attempts: of a pair before it waits for the next check. warm_up_seconds: for each of its two workers.
        warm_up_at_once: concurrent warm-ups.
    """

    interval_seconds: Seconds = 5.0
    timeout_seconds: Seconds = 5.0
    failures: Annotated[int, Field(ge=1, le=1000)] = 3
    cool_down_seconds: Seconds = 10.0
    warm_up_attempts: Annotated[int, Field(ge=1, le=100)] = 5
    warm_up_seconds: Seconds = 60.0
    warm_up_at_once: Annotated[int, Field(ge=1, le=256)] = 4


def _variable(name: object) -> object:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError("use letters, digits and _, and no digit first, in the name of a variable")
    return name


class LaunchSettings(Section):
    """How a worker of `qsun up` runs.

    Attributes:
        python: interpreter of the environment that has vLLM, and qsun for its plugin; None: that of Ray.
        device: where workers compute and transfer KV cache. kernels: of a quantized decode module: ours or vLLM's own.
        dtype, max_model_len, max_num_seqs, kv_cache_memory_bytes, gpu_memory_utilization, tensor_parallel_size: vLLM's
            options of these names; None: vLLM's default.
        eager: neither torch.compile nor CUDA graphs; None: on a CPU.
        threads: OpenMP threads of a worker on a CPU. start_seconds: until all workers must answer.
        max_loras: different adapters in a batch of a worker.
        speculate: most tokens that a worker which decodes drafts in a step, from repeated prompt and answer; 0: none.
        prefill_arguments, decode_arguments: further vLLM options.
        environment: variables of every worker, which override those that qsun sets.
    """

    python: str | None = None
    device: Literal["cpu", "cuda"] = "cuda"
    kernels: Literal["qsun", "vllm"] = "qsun"
    dtype: Dtype = "auto"
    max_model_len: Count | None = None
    max_num_seqs: Count | None = None
    kv_cache_memory_bytes: Count | None = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    tensor_parallel_size: Annotated[int, Field(ge=1, le=64)] = 1
    eager: bool | None = None
    threads: Count = 1
    start_seconds: Seconds = 900.0
    max_loras: Count = 8
    speculate: Annotated[int, Field(ge=0, le=32)] = 0
    prefill_arguments: Names = ()
    decode_arguments: Names = ()
    environment: dict[Annotated[str, BeforeValidator(_variable)], str] = Field(default_factory=dict)

    @property
    def runs_eager(self) -> bool:
        return self.device == "cpu" if self.eager is None else self.eager


class RaySettings(Section):
    """How `qsun up` places replicas on a Ray cluster.

    Attributes:
        cpus, gpus, resources: that one worker takes of its node; gpus None: tensor_parallel_size of them on a GPU.
        ingress_replicas: processes that run the exchange.
        transfer_device: network device over which KV cache moves. `lo` keeps all workers on one machine.
        surge_percent: workers of a new module started before old ones stop, of all; they need free resources.
        linger_seconds: that a prefill worker which is to stop holds KV cache that decode workers have yet to fetch.
        logs: directory on each node for the logs of vLLM; None: qsun-logs-UID, of this user alone, in that of temporary
            files. The newest 10 of a pool stay.
    """

    cpus: Annotated[float, Field(ge=0, le=1024)] = 1.0
    gpus: Annotated[float, Field(ge=0, le=64)] | None = None
    resources: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    ingress_replicas: Annotated[int, Field(ge=1, le=64)] = 1
    transfer_device: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:,-]{1,100}$")] = "lo"
    surge_percent: Annotated[int, Field(ge=0, le=100)] = 0
    linger_seconds: Annotated[float, Field(ge=0, le=600)] = 5.0
    logs: str | None = None


class Cluster(Settings):
    """The whole cluster file.

    Attributes:
        policy: which worker gets a request. prefill_policy: which prefill worker; None: the same, and under
            `partitioned`, which is about decode workers, the least outstanding tokens.
        prefill: the weights that adapters were tuned on, and the workers that serve all adapters; None without
            adapters, and where decode workers serve them.
    """

    listen: Listen = Listen()
    policy: PolicyName = "least_outstanding_tokens"
    prefill_policy: PrefillPolicyName | None = None
    decode: Pool
    prefill: Pool | None = None
    models: Annotated[dict[str, Model], Field(min_length=1, max_length=1000)]
    limits: RequestLimits = RequestLimits()
    health: Health = Health()
    launch: LaunchSettings = LaunchSettings()
    ray: RaySettings = RaySettings()

    @property
    def adapters(self) -> dict[str, Model]:
        """The models that are adapters."""
        return {name: model for name, model in self.models.items() if model.adapter}

    @property
    def one_engine(self) -> bool:
        """Whether each decode worker serves all models by itself, which are adapters on the decode module's weights."""
        return bool(self.adapters) and self.prefill is None

    @property
    def pools(self) -> dict[str, Pool]:
        """All modules that have workers, by their place in the file."""
        others = {f"models.{name}": model for name, model in self.models.items() if not model.adapter}
        return {"decode": self.decode, **({"prefill": self.prefill} if self.prefill else {}), **others}

    def guard_config(self, api_keys: tuple[str, ...]) -> GuardConfig:
        """Return the limits of the HTTP side, above those of the queue, which refuses requests itself."""
        body_bytes, most = self.limits.body_bytes, self.limits.concurrent_requests + self.limits.queued_requests + 64
        return GuardConfig(api_keys=api_keys, max_body_bytes=body_bytes, max_requests=most, host=self.listen.host)
