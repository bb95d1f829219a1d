"""The K and V that prefill modules leave at the prompts of calibration samples, one block in memory at a time.

In service the prompt's KV comes from the prefill module of the request's task. Calibration data of several tasks is
therefore read by several prefill modules, each streamed from its own files (an adapter is merged into a block of its
base as that is loaded): `PrefillActivations.run_block` runs one block over all prompts of its module, keeps what
attention wrote, and releases the block before the decode module's is loaded.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from qsun.errors import QsunError
from qsun.model.adapter_checkpoint import AdaptedCheckpoint, open_prefill
from qsun.model.locate import find_model
from qsun.model.pairing import check_pair
from qsun.model.skeleton import Skeleton
from qsun.quantization.activations import Batch, RecordedKV
from qsun.runtime.kv_cache import CACHE_ARGUMENT


@dataclass(frozen=True)
class PrefillSource:
    """A prefill module that calibration reads prompts with; name as the user gave it."""

    name: str
    skeleton: Skeleton

    @property
    def scale(self) -> float | None:
        """Of its adapter, if it is one."""
        checkpoint = self.skeleton.checkpoint
        return checkpoint.scale if isinstance(checkpoint, AdaptedCheckpoint) else None

    def fingerprint(self) -> str:
        """Return that of its weights. Raises QsunError naming the module for NaN or Inf."""
        try:
            return self.skeleton.checkpoint.fingerprint()
        except QsunError as error:
            raise QsunError(f"prefill module {self.name}: {error}") from None


@dataclass(frozen=True)
class PrefillPlan:
    """Which prefill module reads the prompts of each calibration source.

    Attributes:
        modules: the distinct ones, the base not among them.
        numbers: of each source in order, its module's place in `modules`; None: the base itself.
        names: of each source in order, its prefill module as the user gave it.
        sources: the calibration sources.
    """

    modules: tuple[PrefillSource, ...] = ()
    numbers: tuple[int | None, ...] = ()
    names: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()

    def record(self, base: str, modules: list[str]) -> list[dict[str, str]]:
        """Return name and fingerprint of each source's prefill module, given fingerprints of the base and `modules`."""
        return [
            {"calibration": source, "name": name, "fingerprint": base if number is None else modules[number]}
            for source, name, number in zip(self.sources, self.names, self.numbers, strict=True)
        ]


def plan_prefills(names: Iterable[str], sources: list[str], model: str, base: Skeleton) -> PrefillPlan:
    """Open the prefill modules of a run; the n-th name belongs to the n-th calibration source.

    Raises:
        QsunError: another number of names than of sources, a module that does not fit the base, an adapter whose
            base is missing.
    """
    names = tuple(names)
    if not names:
        return PrefillPlan()
    if len(names) != len(sources):
        raise QsunError(
            f"{len(sources)} calibration sources, but {len(names)} prefill modules; give one --calib-prefill for each "
            f"--calib (the base, {model}, for data whose prompts it reads itself)"
        )
    places: dict[Path, int | None] = {base.checkpoint.directory.resolve(): None}
    modules: list[PrefillSource] = []
    for name in names:
        directory = find_model(name)
        if directory.resolve() not in places:
            places[directory.resolve()] = len(modules)
            modules.append(PrefillSource(name, _open(name, directory, model, base)))
    return PrefillPlan(
        tuple(modules), tuple(places[find_model(name).resolve()] for name in names), names, tuple(sources)
    )


def _open(name: str, directory: Path, model: str, base: Skeleton) -> Skeleton:
    check_pair(name, model)
    return Skeleton(open_prefill(directory), base.dtype, base.device)


def unserved(served: Iterable[str], covered: Iterable[str]) -> list[str]:
    """Return the served prefill modules that are not among the covered ones, by directory."""
    known = {find_model(name).resolve() for name in covered}
    return [name for name in served if find_model(name).resolve() not in known]


class PrefillActivations:
    """The hidden states of one prefill module at the prompts it reads, and the KV of the block it is in.

    Args:
        skeleton: of the prefill module.
        number: of the module; batches of other modules are left out.
        batches: all of the calibration data.
    """

    def __init__(self, skeleton: Skeleton, number: int, batches: list[Batch]):
        self.skeleton = skeleton
        prompts = {i: batch.prompts for i, batch in enumerate(batches) if batch.module == number}
        self._places = [i for i, prompt in prompts.items() if prompt.shape[1]]
        embedded = skeleton.embed([prompts[i] for i in self._places]) if self._places else []
        self.hidden: dict[int, Tensor] = dict(zip(self._places, embedded, strict=True))
        self._kv: dict[int, RecordedKV] = {}

    def run_block(self, index: int) -> None:
        """Run a block over all prompts: keep its KV, and carry the hidden states to its end."""
        self._kv.clear()
        block = self.skeleton.load_block(index)
        for place in self._places:
            hidden, kept = self.hidden[place], RecordedKV()
            arguments = {**self.skeleton.block_arguments(index, hidden), CACHE_ARGUMENT: kept}
            output = block(hidden, **arguments)
            self.hidden[place] = output[0] if isinstance(output, tuple) else output
            self._kv[place] = kept

    def kv(self, number: int) -> RecordedKV:
        """Return K and V of a batch's prompts in the block run last; T is that of the batch's longest prompt."""
        return self._kv[number]
