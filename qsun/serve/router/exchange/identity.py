"""Whether a worker that answers serves the module that it should."""

import httpx

from qsun.serve.router.workers.worker import Worker


async def identity_fault(client: httpx.AsyncClient, worker: Worker) -> str | None:
    """Return why a worker that answers must not be used; None if it serves its module.

    The caller limits the time: httpx's own timeouts of 5 seconds might end before the one in the file.
    """
    health = await client.get(worker.url + "/health", timeout=None)
    if health.status_code != 200:
        return f"/health answers {health.status_code}"
    listed = await client.get(worker.url + "/v1/models", timeout=None)
    if listed.status_code != 200:
        return f"/v1/models answers {listed.status_code}"
    try:
        cards = {str(card["id"]): card for card in listed.json()["data"]}
    except (ValueError, KeyError, TypeError):
        return "/v1/models is not a list of models; is it vLLM?"
    card = cards.get(worker.served_name)
    if card is None:
        return (
            f"it serves {', '.join(cards)[:200] or 'nothing'} and not {worker.served_name}; start it with that module"
        )
    worker.lacking = frozenset(model for model, name in worker.adapters.items() if name not in cards)
    length = card.get("max_model_len")
    worker.max_model_len = length if isinstance(length, int) else None
    return None
