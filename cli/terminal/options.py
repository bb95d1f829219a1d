"""From a command's options, and the YAML file that --config names, to the settings object of what it calls."""

from collections.abc import Mapping
from inspect import signature
from typing import Any, Protocol, TypeVar

from qsun.config import read_config_file


class _Settings(Protocol):
    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Any: ...


S = TypeVar("S", bound=_Settings)


def settings_from(kind: type[S], options: Mapping[str, Any]) -> S:
    """Return the settings that a command's options and its --config file ask for. Options win over the file.

    Args:
        kind: settings class with `from_dict`; options and fields are matched by name.
        options: every option of the command by name (`locals()` in its first line); None means not given. Its
            `config`, where there is one, names the file.
    Raises:
        QsunError: the file cannot be read, or one of its keys or a value is invalid.
    """
    file = options.get("config")
    found = read_config_file(file) if file else {}
    given = {name: options[name] for name in signature(kind).parameters if options.get(name) is not None}
    settings: S = kind.from_dict(found | given)
    return settings
