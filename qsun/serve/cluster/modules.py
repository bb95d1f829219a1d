"""The modules of a cluster on disk: whether they are compatible, and the name under which a worker serves each."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qsun.errors import QsunError
from qsun.model.checkpoint import Checkpoint, files_fingerprint, read_json
from qsun.model.locate import DEMO, find_model
from qsun.model.lora import adapter_fingerprint
from qsun.model.manifest import read_manifest
from qsun.model.pairing import ADAPTER, base_fingerprint, check_served_pair, named_base
from qsun.model.skeleton import EMBEDDING
from qsun.serve.cluster.names import ServedNames, served_name
from qsun.serve.cluster.schema import Cluster, Pool

logger = logging.getLogger(__name__)

_FileStamps = tuple[tuple[str, int, int], ...]
_UNSTABLE_IN_FLOAT16 = ("gemma2", "gemma3", "gemma3_text")  # for which vLLM refuses it


class ModuleChecks:
    """Fingerprints and pair checks, cached until a file of the module changes, so that a reload is quick."""

    def __init__(self) -> None:
        self._fingerprints: dict[Path, tuple[_FileStamps, str]] = {}
        self._pairs: set[tuple[Path, _FileStamps, Path, _FileStamps]] = set()
        self._warned: set[str] = set()

    def names(self, cluster: Cluster) -> ServedNames:
        """Check every pair and return the name of every module. Log where running workers may have several dtypes.

        Raises:
            QsunError: a directory that is not a module, an incompatible pair, or an adapter of other weights.
        """
        decode = _directory("decode.module", cluster.decode.module)
        prefill, pools = {}, cluster.models.items()
        for model, pool in pools:
            key, given = ("adapter", pool.adapter) if pool.adapter else ("module", pool.module)
            prefill[model] = _directory(f"models.{model}.{key}", given)
            self._check(prefill[model], decode, bool(pool.adapter))
        names = {model: served_name(self.fingerprint(prefill[model], bool(pool.adapter))) for model, pool in pools}
        own = served_name(self.fingerprint(decode))
        shared = own if cluster.one_engine else ""
        if cluster.prefill is not None:
            shared = self._shared(cluster.prefill, decode)
        for model in cluster.adapters:
            weights = served_name(adapted_weights(prefill[model]))
            if weights != shared:
                where = "decode.module" if cluster.one_engine else "prefill.module"
                raise QsunError(
                    f"models.{model}.adapter {prefill[model]} was tuned on the weights {weights}, and {where} "
                    f"is {shared}; give the weights that it was tuned on as prefill.module"
                )
        if not isinstance(cluster.decode.workers, int):
            self._warn_of_dtypes(_computed_dtypes(cluster))
        return ServedNames(own, names, shared)

    def _warn_of_dtypes(self, dtypes: dict[str, str]) -> None:
        own = dtypes["decode"]
        for where, dtype in dtypes.items():
            warning = (
                f"by default vLLM computes {where} in {dtype} and decode in {own}, and KV cache of another dtype gives "
                f"wrong answers; start all workers with the same --dtype, such as --dtype {own}"
            )
            if dtype != own and warning not in self._warned:
                logger.warning("%s", warning)
                self._warned.add(warning)

    def _shared(self, pool: Pool, decode: Path) -> str:
        """Return the name of the weights under the adapters: a full-precision base, or the decode module itself."""
        directory = _directory("prefill.module", pool.module)
        if self.fingerprint(directory) != self.fingerprint(decode):
            self._check(directory, decode, adapter=False)
        return served_name(self.fingerprint(directory))

    def fingerprint(self, directory: Path, adapter: bool = False) -> str:
        """Return the fingerprint of a module's weights, or of an adapter. Raises QsunError if it is not plain LoRA."""
        stamps = _stamps(directory)
        known = self._fingerprints.get(directory)
        if known is None or known[0] != stamps:
            own = adapter_fingerprint(directory) if adapter else Checkpoint(directory).fingerprint()
            known = self._fingerprints[directory] = (stamps, own)
        return known[1]

    def _check(self, prefill: Path, decode: Path, adapter: bool) -> None:
        if adapter and not (prefill / ADAPTER).exists():
            raise QsunError(f"{prefill} has no {ADAPTER}; give a full module as `module`, with workers of its own")
        if not adapter and not (prefill / "config.json").exists() and (prefill / ADAPTER).exists():
            raise QsunError(f"{prefill} is a LoRA adapter, which a worker cannot serve by itself; give it as `adapter`")
        key = (prefill, _stamps(prefill), decode, _stamps(decode))
        if key in self._pairs:
            return
        check_served_pair(prefill, decode)
        self._pairs.add(key)


def with_one_dtype(cluster: Cluster) -> Cluster:
    """Return a cluster whose workers compute in one dtype, as KV cache is transferred as raw bytes.

    It is the decode module's, where launch.dtype is `auto` and vLLM would compute its modules in several.
    """
    dtypes = _computed_dtypes(cluster)
    if cluster.launch.dtype != "auto" or len(set(dtypes.values())) == 1:
        return cluster
    logger.info("modules have several dtypes; all workers compute in %s, that of the decode module", dtypes["decode"])
    return cluster.replace(launch=cluster.launch.model_copy(update={"dtype": dtypes["decode"]}))


def _computed_dtypes(cluster: Cluster) -> dict[str, str]:
    """Return the dtype that vLLM's `--dtype auto` chooses for each module with workers, by its place in the file."""
    return {where: _dtype(_directory(f"{where}.module", pool.module)) for where, pool in cluster.pools.items()}


def _dtype(directory: Path) -> str:
    values = read_json(directory / "config.json")
    dtype = str(next(filter(None, _named_dtypes(values)), None) or _stored_dtype(directory)).removeprefix("torch.")
    unstable = dtype == "float16" and values.get("model_type") in _UNSTABLE_IN_FLOAT16
    return "bfloat16" if dtype == "float32" or unstable else dtype


def _named_dtypes(values: dict[str, Any]) -> Iterator[Any]:
    for config in (values, values.get("text_config") or {}):
        yield from (config.get("dtype"), config.get("torch_dtype"))


def _stored_dtype(directory: Path) -> Any:
    checkpoint = Checkpoint(directory)
    return checkpoint.dtype(EMBEDDING) if EMBEDDING in checkpoint else "float32"  # vLLM's own default


def adapted_weights(adapter: Path) -> str:
    """Return the fingerprint of the weights that an adapter was tuned on."""
    made = read_manifest(adapter)
    own = made.get("prefill_weights_fingerprint") or base_fingerprint(made)
    return own if isinstance(own, str) else files_fingerprint(named_base(adapter))


def _directory(where: str, module: str) -> Path:
    if module != DEMO and not Path(module).is_dir():
        raise QsunError(f"{where} {module} is not a directory; give one relative to the cluster file, or 'demo'")
    return find_model(module).resolve()


def _stamps(directory: Path) -> _FileStamps:
    """Return the name, size and time of the last change of every file."""
    files = sorted(path for path in directory.iterdir() if path.is_file())
    return tuple((path.name, stat.st_size, stat.st_mtime_ns) for path in files for stat in [path.stat()])
