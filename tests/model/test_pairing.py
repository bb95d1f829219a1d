"""A compatible pair passes, and every difference of an incompatible one is named with both values."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import qsun
from qsun.errors import QsunError
from qsun.model.checkpoint import Checkpoint
from qsun.model.pairing import base_fingerprint, check_pair, differences, find_base, uncovered
from tests.tiny_models import FAMILIES, build_model


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def write_manifest(directory: Path, **entries: Any) -> Path:
    (directory / "qsun.json").write_text(json.dumps({"kind": "prefill_module", **entries}))
    return directory


@pytest.fixture
def copied(talking_model, tmp_path):
    """A copy of the base with its tokenizer, to be changed: a plain directory as a prefill module."""
    return Path(shutil.copytree(talking_model, tmp_path / "prefill"))


@pytest.fixture(scope="module")
def decode(talking_model, tmp_path_factory) -> Path:
    """The base's decode module."""
    out = tmp_path_factory.mktemp("decode") / "int4"
    qsun.quantize(talking_model, out, qsun.QuantConfig(method="rtn", group_size=32), device="cpu")
    return out


def only_difference(prefill: Path, decode: Path, *says: str) -> None:
    found = differences(prefill, decode)
    assert len(found) == 1, found
    for words in says:
        assert words in found[0]
    assert "\n" not in found[0] and "; " in found[0], "the value, then the fix"


# --- pairs that fit


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_fits_itself_and_its_fine_tunes(family, tiny_model, tmp_path):
    base = tiny_model(family)
    fine_tune = build_model(tmp_path / "tuned", family, torch.bfloat16, seed=1)
    for prefill in (base, fine_tune):
        assert differences(prefill, base) == []
        check_pair(prefill, base)


def test_a_fine_tune_fits_the_quantized_base(copied, decode, talking_model):
    assert differences(copied, decode) == differences(talking_model, decode) == []


def test_the_packaged_base_is_named_demo():
    assert differences("demo", "demo") == []


def test_what_does_not_matter_is_not_compared(copied, decode):
    """Other versions of transformers add, drop and reorder such things; a Trainer sets the padding token."""
    edit(copied / "config.json", transformers_version="5.0.0", pad_token_id=2, dtype="float32", use_cache=False)
    edit(copied / "config.json", tie_word_embeddings=True, initializer_range=0.5)
    tokenizer = json.loads((copied / "tokenizer.json").read_text())
    tokenizer = dict(reversed((tokenizer | {"padding": {"strategy": "BatchLongest"}}).items()))
    (copied / "tokenizer.json").write_text(json.dumps(tokenizer, indent=None))
    assert differences(copied, decode) == []


def test_one_end_of_sequence_is_a_list_of_one(copied, decode):
    edit(copied / "config.json", eos_token_id=[2])
    assert differences(copied, decode) == []


# --- configuration


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("llama", {"num_hidden_layers": 3}, ("num_hidden_layers is 3 ", "and 2 ")),
        ("llama", {"hidden_size": 96, "head_dim": 16}, ("hidden_size is 96 ", "and 64 ")),
        ("llama", {"intermediate_size": 96}, ("intermediate_size is 96 ", "and 128 ")),
        ("llama", {"num_attention_heads": 8, "head_dim": 16}, ("num_attention_heads is 8 ", "and 4 ")),
        ("llama", {"num_key_value_heads": 4}, ("num_key_value_heads is 4 ", "and 2 ")),
        ("qwen3", {"head_dim": 16}, ("head_dim is 16 ", "and 32 ")),
        ("qwen2", {"vocab_size": 160}, ("vocab_size is 160 ", "and 128 ")),
        ("llama", {"rope_theta": 5e5}, ("rope_parameters.rope_theta is 500000.0 ", "and 10000.0 ")),
        (
            "gemma3_text",
            {"rope_local_base_freq": 5e4},
            ("rope_parameters.sliding_attention.rope_theta is 50000.0 ", "and 10000.0 "),
        ),
        ("smollm3", {"no_rope_layers": [1, 1]}, ("no_rope_layers is [1, 1] ", "and [1, 0] ")),
        ("mistral", {"sliding_window": 9}, ("sliding_window is 9 ", "and 7 ")),
        ("mistral", {"sliding_window": None}, ("sliding_window is null ", "and 7 ")),
        ("gemma2", {"attn_logit_softcapping": 5.0}, ("attn_logit_softcapping is 5.0 ", "and 3.0 ")),
        ("gemma2", {"query_pre_attn_scalar": 16}, ("query_pre_attn_scalar is 16 ", "and 32 ")),
        ("llama", {"eos_token_id": 5}, ("eos_token_id is [5] ", "and [2] ")),
        ("llama", {"bos_token_id": 5}, ("bos_token_id is 5 ", "and 1 ")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_different_configuration_is_named(family, changes, says, tiny_model):
    prefill, decode = tiny_model(family, **changes), tiny_model(family)
    only_difference(prefill, decode, *says)
    with pytest.raises(QsunError, match="does not fit decode module") as error:
        check_pair(prefill, decode)
    assert says[0] in str(error.value) and str(prefill) in str(error.value) and str(decode) in str(error.value)


def test_scaled_rope_is_another_rope(tiny_model):
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    found = differences(tiny_model("llama", rope_parameters=scaled), tiny_model("llama"))
    assert sorted(line.partition(";")[0] for line in found) == [
        "rope_parameters.factor is 2.0 in the prefill module and null in the decode module",
        "rope_parameters.rope_type is linear in the prefill module and default in the decode module",
    ]


def test_partial_rotary_embeddings(tiny_model):
    found = differences(tiny_model("phi3", partial_rotary_factor=0.5), tiny_model("phi3"))
    assert any("partial_rotary_factor is 0.5 in the prefill module" in line for line in found)


def test_layer_types(tiny_model):
    swapped = tiny_model("gemma2", layer_types=["full_attention", "sliding_attention"])
    only_difference(swapped, tiny_model("gemma2"), 'layer_types is ["full_attention", "sliding_attention"]')


def test_another_family_is_one_difference_and_not_twenty(tiny_model):
    only_difference(tiny_model("qwen2"), tiny_model("llama"), "model_type is qwen2 ", "and llama ")


def test_the_error_says_how_many_more_there_are(tiny_model):
    prefill = tiny_model("llama", num_hidden_layers=3, num_key_value_heads=4)
    with pytest.raises(QsunError, match=r"num_hidden_layers is 3 .*\(1 more: qsun check-pair\)"):
        check_pair(prefill, tiny_model("llama"))


# --- tokenizer


def test_two_tokens_that_changed_places(copied, decode):
    tokenizer = json.loads((copied / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (copied / "tokenizer.json").write_text(json.dumps(tokenizer))
    only_difference(copied, decode, "tokenizer.json: model.vocab.b is 97 ", "and 98 ", "copy the tokenizer files")


def test_an_added_token(copied, decode):
    tokenizer = json.loads((copied / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({"id": 128, "content": "<new>"})
    (copied / "tokenizer.json").write_text(json.dumps(tokenizer))
    only_difference(copied, decode, "tokenizer.json: added_tokens is 4 entries ", "and 3 entries ")


def bpe(directory: Path, **model: Any) -> Path:
    """Give a model the tokenizer of three tokens, as some version wrote it."""
    vocabulary = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], "byte_fallback": False}
    plain = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "decoder": None}
    (directory / "tokenizer.json").write_text(json.dumps(plain | {"model": vocabulary | model}))
    return directory


@pytest.mark.parametrize("old", [{"merges": ["a b"]}, {"ignore_merges": None}, {"merges": ["a b"], "dropout": None}])
def test_a_tokenizer_that_a_later_library_saved_again(old, copied, talking_model, tmp_path):
    base = bpe(Path(shutil.copytree(talking_model, tmp_path / "base")), **old)
    saved = bpe(copied, ignore_merges=False, fuse_unk=False)
    assert differences(saved, base) == differences(base, saved) == []
    only_difference(bpe(copied, merges=[]), base, "tokenizer.json: model.merges is 0 entries ", "and 1 entries ")


def test_tokenizers_that_the_library_cannot_read_are_compared_as_they_are(copied, talking_model, tmp_path):
    base = bpe(Path(shutil.copytree(talking_model, tmp_path / "base")), type="NextYearsModel", merges=["a b"])
    assert differences(bpe(copied, type="NextYearsModel", merges=["a b"]), base) == []
    only_difference(bpe(copied, type="NextYearsModel", merges=["b a"]), base, "tokenizer.json: model.merges[0] is b a")


def test_a_missing_tokenizer(copied, decode):
    (copied / "tokenizer.json").unlink()
    only_difference(copied, decode, "tokenizer.json is absent in the prefill module")


def test_files_of_slow_tokenizers_are_compared_where_there_is_no_fast_one(copied, decode, tmp_path):
    other = shutil.copytree(decode, tmp_path / "decode")
    for directory in (copied, other):
        (directory / "tokenizer.json").unlink()
        (directory / "merges.txt").write_text("a b\n")
    assert differences(copied, other) == []
    (copied / "merges.txt").write_text("b a\n")
    only_difference(copied, other, "merges.txt")


@pytest.mark.parametrize(("key", "value"), [("bos_token", "<pad>"), ("eos_token", {"content": "<pad>"})])
def test_tokenizer_settings(key, value, copied, decode):
    edit(copied / "tokenizer_config.json", **{key: value})
    only_difference(copied, decode, f"tokenizer_config.json: {key} is ")


@pytest.mark.parametrize("key", ["add_bos_token", "add_eos_token", "add_prefix_space"])
def test_what_a_tokenizer_adds(key, copied, talking_model, tmp_path):
    """transformers 5 drops such a setting as it saves, as tokenizer.json has it too; slow tokenizers have no other."""
    base = Path(shutil.copytree(talking_model, tmp_path / "base"))
    edit(base / "tokenizer_config.json", **{key: False})
    assert differences(copied, base) == differences(base, copied) == []
    edit(copied / "tokenizer_config.json", **{key: True})
    only_difference(copied, base, f"tokenizer_config.json: {key} is true ", "and false ")
    edit(copied / "tokenizer_config.json", **{key: None})
    for directory in (copied, base):
        (directory / "tokenizer.json").rename(directory / "vocab.json")
    only_difference(copied, base, f"tokenizer_config.json: {key} is null ", "and false ")


def test_a_special_token_may_be_written_with_its_properties(copied, decode):
    edit(copied / "tokenizer_config.json", eos_token={"content": "</s>", "lstrip": False, "__type": "AddedToken"})
    assert differences(copied, decode) == []


def test_another_chat_template(copied, decode):
    (copied / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    only_difference(copied, decode, "chat_template is {{ messages[0]['content'] }} in the prefill module")


def test_a_chat_template_may_lie_in_either_file(copied, decode):
    template = (copied / "chat_template.jinja").read_text()
    (copied / "chat_template.jinja").unlink()
    edit(copied / "tokenizer_config.json", chat_template=template)
    assert differences(copied, decode) == []


# --- base and role


@pytest.mark.parametrize("nested", [False, True])
def test_the_base_that_a_prefill_module_was_tuned_from(nested, copied, decode, talking_model):
    own, other = Checkpoint(talking_model).fingerprint(), "0" * 64
    for target in (decode, talking_model):  # one names its base, the other is it
        for fingerprint, fits in ((own, True), (other, False)):
            named = {"base": {"fingerprint": fingerprint}} if nested else {"base_fingerprint": fingerprint}
            write_manifest(copied, **named)
            if fits:
                assert differences(copied, target) == []
            else:
                only_difference(copied, target, "base fingerprint is 0000000000000000 ", f"and {own[:16]} ")


def test_a_base_that_has_changed_since_is_not_picked(talking_model, tiny_model, tmp_path, cli):
    """It would read prompts for a decode module of other weights."""
    base, out = Path(shutil.copytree(talking_model, tmp_path / "base")), tmp_path / "int4"
    qsun.quantize(base, out, qsun.QuantConfig(method="rtn", group_size=32), device="cpu")
    assert find_base(out) == (base, str(base))
    shutil.copy(tiny_model("llama", torch.bfloat16, initializer_range=0.2) / "model.safetensors", base)
    says = f"{base} is not the base that {out} was made from: their fingerprints differ "
    with pytest.raises(QsunError, match=says):
        find_base(out)
    answer = cli("generate", out, "Tom>", "--device", "cpu")
    assert (answer.code, answer.out) == (2, "") and says in answer.err
    shutil.copy(talking_model / "model.safetensors", base)
    assert find_base(out) == (base, str(base))
    edit(out / "qsun.json", base_fingerprint=None)
    assert find_base(out) == (base, str(base))


def test_manifests_of_both_kinds_name_the_base(decode, talking_model):
    made = json.loads((decode / "qsun.json").read_text())
    assert base_fingerprint(made) == Checkpoint(talking_model).fingerprint()
    assert base_fingerprint({}) is None and base_fingerprint({"base": "some/name"}) is None


def test_an_adapter_is_known_by_its_manifest(decode, talking_model, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"r": 8}')
    assert "adapter_config.json names no base_model_name_or_path" in differences(adapter, decode)[0]
    settings = {"r": 8, "base_model_name_or_path": str(talking_model)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    assert differences(adapter, decode) == [], "as peft leaves it"
    write_manifest(adapter, base_fingerprint=Checkpoint(talking_model).fingerprint())
    assert differences(adapter, decode) == []
    write_manifest(adapter, base_fingerprint="f" * 64)
    only_difference(adapter, decode, "base fingerprint is ffffffffffffffff ")


def test_a_quantized_module_is_no_prefill_module(decode, talking_model):
    only_difference(decode, talking_model, "is quantized (gptq)", "give the prefill module first")


def test_a_prefill_module_is_no_decode_module(copied, talking_model):
    write_manifest(copied)
    only_difference(talking_model, copied, "is a prefill module itself")


def test_what_is_no_model_is_refused(talking_model, tmp_path):
    for pair in ((tmp_path, talking_model), (talking_model, tmp_path), (tmp_path / "nothing", talking_model)):
        with pytest.raises(QsunError):
            differences(*pair)


def test_inspect_knows_a_prefill_module(cli, copied):
    write_manifest(copied, base_fingerprint="0" * 64)
    answer = cli("inspect", copied)
    assert answer.code == 0 and f"{copied}: prefill module, llama, full precision" in answer.out


# --- coverage


def covering(decode: Path, to: Path, bits: int, fingerprint: str) -> Path:
    """A copy of a decode module that says it was calibrated with one prefill module's KV."""
    shutil.copytree(decode, to)
    layers = [{"name": "a", "bits": 8}, {"name": "b", "bits": bits}]
    edit(to / "qsun.json", layers=layers, prefill_modules=[{"name": "P1", "fingerprint": fingerprint}])
    return to


@pytest.mark.parametrize(("bits", "warns"), [(2, True), (3, True), (4, False)])
def test_a_module_that_calibration_left_out_is_warned_of_at_few_bits(bits, warns, copied, decode, tmp_path, cli):
    few = covering(decode, tmp_path / "few", bits, "0" * 64)
    warning = uncovered(copied, few)
    assert (warning is not None) == warns
    answer = cli("check-pair", copied, few)
    assert answer.code == 0 and answer.out == "OK\n" and (("warning: " in answer.err) == warns)
    if warning:
        assert f"of {bits} bits was calibrated with the KV of P1, not of {copied}" in warning


def test_a_covered_module_and_its_descendants_are_not(copied, decode, tmp_path):
    few = covering(decode, tmp_path / "few", 2, Checkpoint(copied).fingerprint())
    assert uncovered(copied, few) is None
    write_manifest(copied, fingerprint="1" * 64)
    assert uncovered(copied, few) is not None, "what the manifest says comes first"
    write_manifest(copied, fingerprint="1" * 64, lineage=["2" * 64, Checkpoint(copied).fingerprint()])
    assert uncovered(copied, few) is None


def test_a_module_calibrated_without_prefill_modules_warns_of_none(copied, decode):
    edit_free = json.loads((decode / "qsun.json").read_text())
    assert not edit_free.get("prefill_modules")
    assert uncovered(copied, decode) is None


# --- the command


def test_the_command_prints_ok(cli, copied, decode):
    answer = cli("check-pair", copied, decode)
    assert (answer.code, answer.out, answer.err) == (0, "OK\n", "")
    answer = cli("check-pair", copied, decode, "--json")
    assert json.loads(answer.out) == {"fits": True, "differences": [], "warning": None}


def test_the_command_prints_every_difference(cli, tiny_model):
    pair = tiny_model("llama", num_hidden_layers=3, num_key_value_heads=4), tiny_model("llama")
    answer = cli("check-pair", *pair)
    assert answer.code == 2 and answer.out == ""
    assert [line.partition(" is ")[0] for line in answer.err.splitlines()] == [
        "error: num_hidden_layers",
        "error: num_key_value_heads",
    ]
    answer = cli("check-pair", *pair, "--json")
    assert answer.code == 2 and json.loads(answer.out)["differences"] == differences(*pair)
