"""Tasks for lm-eval: YAML files and the functions that they name. `qsun lm-eval` finds them by itself."""

from pathlib import Path


def tasks_directory() -> Path:
    """Return the folder for lm-eval's --include_path and TaskManager(include_path=...)."""
    return Path(__file__).resolve().parent
