"""A pytest plugin of what Triton's interpreter runs: memory that nobody wrote is NaN, and calls take half the time."""

from types import SimpleNamespace

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture(autouse=True)
def empty_is_nan():
    torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN


@pytest.fixture(autouse=True, scope="session")
def language_patched_once():
    """Triton's language stays replaced from the first test to the last.

    Triton 3.9 looks through all of it at each launch and at each call of a device function, which takes half of the
    time and changes nothing.
    """
    scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", lambda function: SimpleNamespace(restore=lambda: None))
        yield
    scope.restore()


@pytest.fixture(autouse=True, scope="session")
def dtypes_looked_up_once():
    """Triton 3.9 makes a table of all of them at each load and conversion."""
    found, look_up = {}, interpreter._get_np_dtype

    def known(dtype):
        name = dtype.scalar.name
        if name not in found:
            found[name] = look_up(dtype)
        return found[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_get_np_dtype", known)
        yield
