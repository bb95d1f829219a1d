"""Which tokens an adapter of vLLM acts on, and which blocks of a prefix cache it may share. Without vLLM."""

import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest

from qsun.errors import QsunError
from qsun.vllm import prefill_lora
from qsun.vllm.lora_guard import RequirePrefillLora
from qsun.vllm.prefill_lora import boundary_keys, install, prompt_mask


def by_hand(computed, scheduled, lengths):
    positions = [
        (start + i, n) for start, count, n in zip(computed, scheduled, lengths, strict=True) for i in range(count)
    ]
    return [position < n - 1 for position, n in positions]


def test_prompt_mask_against_a_loop():
    random = np.random.default_rng(0)
    for _ in range(200):
        rows = random.integers(1, 9)
        computed, scheduled = random.integers(0, 20, rows), random.integers(0, 12, rows)
        lengths = random.integers(1, 30, rows)
        assert prompt_mask(computed, scheduled, lengths).tolist() == by_hand(computed, scheduled, lengths)


@pytest.mark.parametrize(
    "computed,scheduled,length,expected",
    [
        (0, 5, 5, [True] * 4 + [False]),  # a whole prompt
        (0, 1, 1, [False]),  # a prompt of one token
        (5, 1, 5, [False]),  # decode
        (0, 7, 5, [True] * 4 + [False] * 3),  # computed again after a preemption, with two output tokens
        (3, 1, 5, [True]),
        (4, 1, 5, [False]),
    ],
)
def test_prompt_mask_at_the_seam(computed, scheduled, length, expected):
    assert prompt_mask(*(np.array([value]) for value in (computed, scheduled, length))).tolist() == expected


def test_blocks_that_reach_the_seam_have_keys_of_their_own():
    """Of a prompt of 32 tokens the base computes position 31."""
    assert boundary_keys(32, 16) == []
    assert boundary_keys(32, 31) == []
    assert boundary_keys(32, 32) == [("qsun_seam", 31)]
    assert boundary_keys(33, 32) == []
    assert boundary_keys(32, 48) != boundary_keys(40, 48)


class InputBatch:
    def make_lora_inputs(self, num_scheduled_tokens):
        """Another vLLM's, with other parameters."""


def test_a_vllm_with_other_functions_is_refused(monkeypatch):
    monkeypatch.setattr(prefill_lora, "_find", lambda module, owner: InputBatch)
    with pytest.raises(QsunError, match=r"make_lora_inputs\(self, num_scheduled_tokens\) of this vLLM is not the"):
        install()
    assert not hasattr(InputBatch.make_lora_inputs, "qsun")


@pytest.mark.parametrize(("version", "warns"), [("0.32.0", False), ("0.32.4.dev1", False), ("0.33.0", True)])
def test_another_version_with_the_same_functions_is_warned_of(version, warns, monkeypatch, caplog):
    def changed(original):
        return lambda self, count: original(self, count) + 1

    class Batch:
        def make(self, count):
            return count

    monkeypatch.setattr(prefill_lora, "_REPLACEMENTS", [("vllm.batch", "Batch", "make", "self count", changed)])
    monkeypatch.setattr(prefill_lora, "_find", lambda module, owner: Batch)
    monkeypatch.setattr(prefill_lora, "import_module", lambda name: SimpleNamespace(__version__=version))
    signals = []
    monkeypatch.setattr(os, "kill", lambda pid, number: signals.append((pid, number)))
    with pytest.raises(QsunError, match="adapters would act on answers too"):
        RequirePrefillLora(None)
    assert signals == [(os.getpid(), signal.SIGTERM)]
    caplog.clear()
    install()
    install()  # vLLM may load its plugins more than once
    assert Batch().make(5) == 6
    RequirePrefillLora(None)
    assert bool(caplog.messages) is warns
    assert all("tested with vLLM 0.32, and this is 0.33.0" in message for message in caplog.messages)


def test_a_vllm_without_the_function_is_refused():
    with pytest.raises(QsunError, match="unset QSUN_PREFILL_LORA"):
        prefill_lora._find("no_such_module", "")


def test_where_there_is_no_vllm_nothing_is_replaced(monkeypatch):
    monkeypatch.setattr(prefill_lora, "_REPLACEMENTS", [("no_such_module", "", "make", "self", None)])
    assert not prefill_lora.installed()
