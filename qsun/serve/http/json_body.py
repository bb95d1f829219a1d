"""Bodies of requests as JSON that can be sent on: numbers are finite, and text is whole characters."""

import json
from typing import Any, NoReturn

from qsun.errors import shortened


def parse_json(raw: bytes) -> Any:
    """Return the value of a body.

    Raises:
        ValueError: it is not JSON, or Python reads what JSON cannot hold: NaN, 1e999, or half a character, "\\ud800".
    """
    try:
        value = json.loads(raw, parse_constant=_reject_constant)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(shortened(error, 200)) from None
    return value


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")
