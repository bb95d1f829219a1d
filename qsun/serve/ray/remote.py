"""Deploys to a running Ray cluster through the REST API of its dashboard, as `serve deploy` does."""

from typing import Any

import httpx

from qsun.errors import QsunError

_PATH = "/api/serve/applications/"
_SECONDS = 60.0


def put_config(address: str, config: dict[str, Any]) -> None:
    """Have the cluster run this config. Applications that have not changed are left alone.

    Args:
        address: of the dashboard, http://host:port.
    Raises:
        QsunError: it cannot be reached, or refuses the config.
    """
    if not address.startswith(("http://", "https://")):
        raise QsunError(f"--address {address} is not a dashboard's; give http://HEAD:8265")
    try:
        answer = httpx.put(address.rstrip("/") + _PATH, json=config, timeout=_SECONDS, trust_env=False)
    except httpx.HTTPError as error:
        raise QsunError(f"{address} does not answer: {error or type(error).__name__}") from None
    if answer.status_code != 200:
        raise QsunError(f"{address} answers {answer.status_code}: {' '.join(answer.text.split())[:500]}")
