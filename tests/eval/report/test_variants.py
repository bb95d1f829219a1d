"""Which pairs an evaluation compares, from options and from a file."""

import json
import shutil

import pytest

from qsun.config import QuantConfig
from qsun.errors import QsunError
from qsun.eval.report.variants import from_file, from_options, stored_bits
from qsun.quantization.run import quantize


@pytest.fixture(scope="module")
def int3(tmp_path_factory):
    out = tmp_path_factory.mktemp("variants") / "int3"
    quantize("demo", out, QuantConfig(method="rtn", bits=3, format="compressed-tensors"), device="cpu")
    return out


def test_options_name_the_usual_variants(int3):
    pairs = {e.name: (e.prefill, e.decode) for e in from_options(str(int3), "P", "F", ["t"]).entries}
    assert pairs == {
        "base": ("demo", "demo"),
        "full fine-tune": ("F", "F"),
        "SUN": ("P", "demo"),
        "QSUN int3": ("P", str(int3)),
    }
    assert from_options(str(int3), "P", None, ["t"]).reference == "SUN"
    alone = from_options(str(int3), "", None, ["t"])
    assert [(e.name, e.prefill) for e in alone.entries] == [("base", "demo"), ("base int3", "demo")]
    assert alone.reference == "base"
    assert [e.name for e in from_options("demo", "P", None, []).entries] == ["base", "SUN"]
    assert stored_bits(str(int3)) == 3 and stored_bits("demo") == 0


def test_bits_are_those_of_the_module_and_not_of_an_override(int3, tmp_path):
    """compressed-tensors has no bits of the whole, and its groups stand in the order of the layers."""
    module = tmp_path / "module"
    shutil.copytree(int3, module)
    config = json.loads((module / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    override = {**groups["group_0"], "weights": groups["group_0"]["weights"] | {"num_bits": 8}}
    config["quantization_config"]["config_groups"] = {"group_0": override, "group_1": groups["group_0"]}
    (module / "config.json").write_text(json.dumps(config))
    assert stored_bits(str(module)) == 3
    (module / "qsun.json").unlink()
    assert stored_bits(str(module)) == 8  # another tool's, which says no more


def test_an_empty_list_of_tasks_answers_none_of_them(tmp_path):
    file = tmp_path / "matrix.yaml"
    file.write_text("{variants: [{name: SUN, model: demo}, {name: SUN, model: demo, tasks: []}], tasks: [a, b]}")
    assert [entry.answers(["a", "b"]) for entry in from_file(file).entries] == [["a", "b"], []]


def test_a_file_names_directories_beside_it(tmp_path):
    (tmp_path / "sun").mkdir()
    (tmp_path / "valid.jsonl").write_text("{}\n")
    file = tmp_path / "matrix.yaml"
    file.write_text(
        "variants:\n- {name: base, model: demo}\n"
        "- {name: SUN, prefill: sun, decode: demo, tasks: [b], responses: valid.jsonl}\n"
        "- {name: SUN, prefill: elsewhere, decode: demo, tasks: [a]}\ntasks: [a, b]\n"
    )
    matrix = from_file(file)
    assert matrix.names() == ["base", "SUN"] and matrix.reference == "SUN" and matrix.tasks == ("a", "b")
    base, first, second = matrix.entries
    assert (base.prefill, base.decode, base.alone) == ("demo", "demo", True)
    assert base.answers(matrix.tasks) == ["a", "b"] and first.answers(matrix.tasks) == ["b"]
    assert first.prefill == str(tmp_path / "sun") and second.prefill == "elsewhere"
    assert first.responses == str(tmp_path / "valid.jsonl") and not second.responses
    assert from_file(file, ["b"]).tasks == ("b",)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", "matrix.yaml is not YAML: while parsing"),
        ("[]", "is not a mapping of settings"),
        ("variants: []", r"variants \[\] is invalid: list should have at least 1 item"),
        ("variants: [1]", "variants.0 1 is invalid: input should be a valid dictionary"),
        (
            "variants: [{name: x, modell: demo}]",
            "unknown setting 'variants.0.modell'; did you mean model\\? known are: base, decode, model, name",
        ),
        ("variants: [{name: x, model: demo, model: P}]", "key 'model' occurs twice"),
        ("variants: [{name: x, prefill: demo}]", "'x' needs a model, or a prefill and a decode module"),
        ("variants: [{name: x, model: 5}]", "variants.0.model 5 is not a string"),
        ("variants: [{name: x, model: demo, base: 5}]", "variants.0.base 5 is not a string"),
        (
            "variants: [{name: x, model: demo, tasks: qsun_math}]",
            "variants.0.tasks 'qsun_math' is invalid: input",
        ),
        (
            "{variants: [{name: x, model: demo, tasks: [u]}], tasks: [t]}",
            "has the task 'u', which `tasks` does not list",
        ),
        ("{variants: [{name: x, model: demo}, {name: x, model: P}], tasks: [t]}", "two entries named 'x' answer t"),
        ("variants: [{name: x, model: demo, responses: no.jsonl}]", "responses no.jsonl is not a file"),
        (
            "{variants: [{name: x, model: demo}], tasks: [t], reference: y}",
            "the reference 'y' is not a variant; use one of x",
        ),
    ],
)
def test_a_wrong_file_is_one_clear_line(tmp_path, text, says):
    file = tmp_path / "matrix.yaml"
    file.write_text(text)
    with pytest.raises(QsunError, match=says) as error:
        from_file(file)
    assert "\n" not in str(error.value)
