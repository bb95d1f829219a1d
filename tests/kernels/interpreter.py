"""A pytest plugin of what Triton's interpreter runs: memory that nobody wrote is NaN, and calls take half the time."""

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture(autouse=True)
def empty_is_nan():
    torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN


@pytest.fixture(autouse=True, scope="session")
def language_patched_once():
    """A call of a device function replaces Triton's language only where the kernel's launch or another call did not.

    Triton 3.9 looks through all of it at each call, which takes half of the time and changes nothing.
    """

    def call(function, *arguments, **options):
        known = function.fn.__globals__.values()
        if any(each is lang and tl.core.is_builtin(lang.load) for each in known for lang in (tl, tl.core)):
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield
