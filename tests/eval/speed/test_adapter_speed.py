"""`qsun bench adapters`: it compares what it says, on weights that are shared, and counts their bytes."""

import json

import pytest

import qsun
from qsun.adapters.shared_prefill import SharedPrefill
from qsun.engine.decode_batch import DecodeBatch
from qsun.eval.speed.adapter_speed import report_text


@pytest.fixture
def int4(tmp_path):
    out = tmp_path / "int4"
    qsun.quantize("demo", out, qsun.QuantConfig(method="rtn", group_size=32), device="cpu")
    return out


@pytest.mark.parametrize("weights", ["base", "decode"])
def test_both_sides_take_turns(cli, int4, weights, monkeypatch):
    passes, steps, rows, turns = [], [], SharedPrefill.rows, DecodeBatch.turns
    monkeypatch.setattr(SharedPrefill, "rows", lambda self, given: passes.append(given) or rows(self, given))
    monkeypatch.setattr(DecodeBatch, "turns", lambda self, *a: steps.append(self) or turns(self, *a))
    options = ("--count", 3, "--rank", 2, "--prompt", 8, "--rounds", 2, "--steps", 4)
    answer = cli("bench", "adapters", "--decode", int4, "--prefill-weights", weights, *options, "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    mixed = [given for given in passes if given != [None] * 3]
    assert len(passes) == 2 * (2 + 1) + 2  # turns of prefill, one of each not timed, and the prompts of decode
    assert len(mixed) == len(passes) / 2 and all(len(set(given)) == 3 for given in mixed)
    assert len(steps) == 2 * (4 + 1) and len(set(steps)) == 2
    assert found["prefill_ratio"] == found["seconds"]["prefill"] / found["seconds"]["prefill_of_one_module"]
    assert found["decode_ratio"] == found["seconds"]["decode"] / found["seconds"]["decode_of_base"]
    assert found["seconds"]["load"] > 0
    decode = qsun.load_decode(int4, "cpu").model
    held = sum(
        t.numel() * t.element_size()
        for t in {t.data_ptr(): t for t in (*decode.parameters(), *decode.buffers())}.values()
    )
    full = sum(p.numel() * p.element_size() for p in qsun.load_decode("demo", "cpu").model.parameters())
    assert found["merged_bytes"] == held + 3 * full
    assert found["bytes"] - found["adapter_bytes"] - held == pytest.approx(full if weights == "base" else 0, abs=4096)
    assert "3 adapters of rank 2" in report_text(found)


def test_what_it_refuses(cli):
    answer = cli("bench", "adapters", "--prefill-weights", "both")
    assert answer.code == 2
    assert "--prefill-weights" in answer.err
