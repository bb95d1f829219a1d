"""The modules of a cluster on disk: whether they are compatible, and the name under which a worker serves each."""

import logging
from pathlib import Path

from qsun.errors import QsunError
from qsun.model.checkpoint import Checkpoint
from qsun.model.locate import DEMO, find_model
from qsun.model.pairing import check_pair, uncovered
from qsun.serve.cluster.names import ServedNames, served_name
from qsun.serve.cluster.schema import Cluster

logger = logging.getLogger(__name__)

_FileStamps = tuple[tuple[str, int, int], ...]


class ModuleChecks:
    """Fingerprints and pair checks, cached until a file of the module changes, so that a reload is quick."""

    def __init__(self) -> None:
        self._fingerprints: dict[Path, tuple[_FileStamps, str]] = {}
        self._pairs: set[tuple[Path, _FileStamps, Path, _FileStamps]] = set()

    def names(self, cluster: Cluster) -> ServedNames:
        """Check every pair and return the name of every module.

        Raises:
            QsunError: a directory that is not a module, a LoRA adapter, or an incompatible pair.
        """
        decode = _directory("decode", cluster.decode.module)
        prefill = {model: _directory(f"models.{model}", pool.module) for model, pool in cluster.models.items()}
        for directory in dict.fromkeys(prefill.values()):
            self._check(directory, decode)
        return ServedNames(
            served_name(self.fingerprint(decode)),
            {model: served_name(self.fingerprint(directory)) for model, directory in prefill.items()},
        )

    def fingerprint(self, directory: Path) -> str:
        stamps = _stamps(directory)
        known = self._fingerprints.get(directory)
        if known is None or known[0] != stamps:
            known = self._fingerprints[directory] = (stamps, Checkpoint(directory).fingerprint())
        return known[1]

    def _check(self, prefill: Path, decode: Path) -> None:
        if not (prefill / "config.json").exists() and (prefill / "adapter_config.json").exists():
            raise QsunError(f"{prefill} is a LoRA adapter, which a worker cannot serve by itself; merge it first")
        key = (prefill, _stamps(prefill), decode, _stamps(decode))
        if key in self._pairs:
            return
        check_pair(prefill, decode)
        self._pairs.add(key)
        warning = uncovered(prefill, decode)
        if warning:
            logger.warning("%s", warning)


def _directory(where: str, module: str) -> Path:
    if module != DEMO and not Path(module).is_dir():
        raise QsunError(f"{where}.module {module} is not a directory; give one relative to the cluster file, or 'demo'")
    return find_model(module).resolve()


def _stamps(directory: Path) -> _FileStamps:
    """Return the name, size and time of the last change of every file."""
    files = sorted(path for path in directory.iterdir() if path.is_file())
    return tuple((path.name, stat.st_size, stat.st_mtime_ns) for path in files for stat in [path.stat()])
