"""Curves through measured points, beyond them, and the computed ones."""

import json

import pytest

from qsun.errors import QsunError
from qsun.eval.simulate.curves import QSUN, SUN, Curves, computed_curves, load_curves, measured_curves, prompt_line


def row(batch, context, tpot, prefill, variant=SUN):
    size = {"weight_bytes": 1e9, "kv_bytes": batch * context * 1000}
    return {"variant": variant, "batch": batch, "context": context, "tpot_ms": tpot, "prefill_ms": prefill} | size


@pytest.fixture
def curves():
    """step = 10 + 2 batch + 0.01 batch context ms at the measured points; prefill = 5 + 0.1 tokens ms."""
    rows = [
        row(b, c, 10 + 2 * b + 0.01 * b * c, 5 + 0.1 * c)
        for c in (100, 300)
        for b in ((2, 4, 8) if c < 300 else (2, 4))
    ]
    return measured_curves({"model": "m", "machine": "here", "rows": rows})


def test_measured_points_and_straight_lines_between_them(curves):
    assert curves.step(SUN, 4, 100) == pytest.approx(0.022)
    assert curves.step(SUN, 3, 100) == pytest.approx(0.019)
    assert curves.step(SUN, 3, 200) == pytest.approx(0.022)  # bilinear, as the formula is
    assert curves.step(SUN, 8, 100) == pytest.approx(0.034)
    assert curves.prefill(200) == pytest.approx(0.025)
    assert curves.source == "m, measured on here"


def test_beyond_the_points(curves):
    assert curves.step(SUN, 1, 100) == curves.step(SUN, 2, 100)  # flat below
    assert curves.step(SUN, 2, 10) == curves.step(SUN, 2, 100)
    assert curves.step(SUN, 16, 300) == pytest.approx(0.09)  # straight on above, where batch 8 was not measured too
    assert curves.step(SUN, 2, 500) == pytest.approx(0.024)
    assert curves.prefill(50) == pytest.approx(0.010)
    assert curves.prefill(0) == pytest.approx(0.005)
    assert curves.prefill(1000) == pytest.approx(0.105)
    assert not curves.beyond(SUN, 4, 300)
    assert curves.beyond(SUN, 5, 100)  # one of the contexts ends at 4
    assert curves.beyond(SUN, 2, 301)


def test_a_curve_that_falls_at_its_end_does_not_fall_on():
    falling = measured_curves({"model": "m", "machine": "h", "rows": [row(1, 10, 5, 1), row(2, 10, 4, 1)]})
    assert falling.step(SUN, 1000, 10) == pytest.approx(0.004)


def test_a_prompt_in_pieces_costs_a_pass_more_for_each(curves):
    whole = curves.chunk(300, 0)
    assert curves.chunk(100, 0) + curves.chunk(200, 100) == pytest.approx(whole + curves.prefill(0))
    assert curves.chunk(0, 0) == 0


def test_a_single_measured_prompt_is_in_proportion():
    assert prompt_line({100: 0.2})(50) == pytest.approx(0.1)


def test_extra_prompt_lengths_are_used():
    result = {"model": "m", "machine": "h", "rows": [row(1, 100, 5, 10)], "prefill": [{"tokens": 20, "ms": 6}]}
    assert measured_curves(result).prefill(60) == pytest.approx(0.008)


def test_memory_holds_weights_first(curves):
    assert curves.kv_tokens(SUN, 2e9) == 800_000
    with pytest.raises(QsunError, match="cannot hold 2 x sun"):
        curves.kv_tokens(SUN, 2e9, modules=2)
    with pytest.raises(QsunError, match="give --kv-tokens"):
        Curves(lambda *_: 1.0, lambda _: 1.0, "s").kv_tokens(SUN, 1e9)


def test_computed_floors_are_those_of_the_design_and_say_what_they_are():
    curves = computed_curves("llama-3.1-8b")
    assert curves.step(SUN, 1, 1024) == pytest.approx(3.52e-3, rel=0.01)
    assert curves.step(QSUN, 1, 1024) == pytest.approx(1.11e-3, rel=0.01)
    assert curves.step(SUN, 32, 1024) / curves.step(QSUN, 32, 1024) == pytest.approx(2.16, rel=0.01)
    assert "not measured" in curves.source
    assert curves.prefill(4096) > 2 * curves.prefill(2048) > 0


def test_files(tmp_path, curves):
    path = tmp_path / "speed.json"
    path.write_text(json.dumps({"model": "m", "machine": "h", "rows": [row(1, 100, 5, 10)]}))
    assert load_curves(str(path)).step(SUN, 1, 100) == pytest.approx(0.005)
    assert "COMPUTED" in load_curves("computed:qwen3-8b").source
    for text, problem in (("{", "not JSON"), ("{}", "lack 'rows'"), ('{"rows": []}', "no rows")):
        path.write_text(text)
        with pytest.raises(QsunError, match=problem):
            load_curves(str(path))
    for source in (str(tmp_path / "none"), "computed:gpt-5"):
        with pytest.raises(QsunError):
            load_curves(source)
    with pytest.raises(QsunError, match="variant 'qsun' was not measured"):
        curves.step(QSUN, 1, 100)


def test_curves_come_through_a_pipe(pipe):
    with pytest.raises(QsunError, match="lack 'rows'"):
        load_curves(pipe("{}"))
