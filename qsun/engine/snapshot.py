"""Where the requests of each model are, for metrics and for threads that ask."""

from collections.abc import Callable, Iterable

from qsun.engine.prefilling import LoadedModule, PrefillTask
from qsun.engine.rows import Row
from qsun.engine.state import ModelState


def model_states(
    modules: Iterable[LoadedModule], waiting: Callable[[str], int], in_progress: Iterable[Row | PrefillTask]
) -> dict[str, ModelState]:
    """By name of the model. waiting: gives a model's requests in the queue."""
    decoding: dict[str, int] = {}
    prefilling: dict[str, int] = {}
    kv_tokens: dict[str, int] = {}
    for item in in_progress:
        model, decodes = item.request.model, isinstance(item, Row)
        counted = decoding if decodes else prefilling
        counted[model] = counted.get(model, 0) + 1
        held = item.request.prefix_tokens + item.count if isinstance(item, Row) else item.done
        kv_tokens[model] = kv_tokens.get(model, 0) + held
    return {
        owner.name: ModelState(
            waiting(owner.name),
            prefilling.get(owner.name, 0),
            decoding.get(owner.name, 0),
            kv_tokens.get(owner.name, 0),
            owner.leaving,
        )
        for owner in modules
    }
