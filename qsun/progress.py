"""Callbacks through which long work reports what it does."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # what is being done, steps done, steps in all
Note = Callable[[str], None]  # one line that the user should see
