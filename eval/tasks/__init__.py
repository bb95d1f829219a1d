"""Tasks for lm-eval: YAML files, and the functions they name. `qsun lm-eval` finds them by itself."""

from pathlib import Path


def tasks_directory() -> Path:
    """For lm-eval's --include_path, and TaskManager(include_path=...)."""
    return Path(__file__).resolve().parent
