"""The packaged demo base is a real, loadable, pretrained Llama, and its recipe still runs."""

import json
import math
from itertools import pairwise
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from qsun.demo import base_directory, calibration_file, corpus
from qsun.demo.muon import orthogonalize
from qsun.demo.pretrain import PretrainConfig, build, build_model
from qsun.demo.score import exact_match, response_loss
from qsun.demo.tokenizer import BOS_ID, EOS_ID, PAD_ID, character_ids

BASE_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
PARAMETERS = 803_968
HELD_OUT_WITH_TWELVE = [7, 11, 26, 32, 39, 47]
LEAST_EXACT_MATCH = {"arithmetic": 0.85, "string": 0.7, "json": 0.75}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base():
    return AutoModelForCausalLM.from_pretrained(base_directory(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(base_directory())


def documents(family, count, *, seed=5, held_out=False):
    rng = Random(seed)
    return [corpus.family_document(rng, family, held_out=held_out) for _ in range(count)]


def test_the_directory_is_a_small_plain_llama(base):
    files = {file.name: file for file in base_directory().iterdir()}
    assert set(files) >= BASE_FILES
    assert sum(file.stat().st_size for file in files.values()) <= 2_000_000
    config = json.loads(files["config.json"].read_text())
    expected = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    expected |= {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID, "vocab_size": 128}
    assert {key: config[key] for key in expected} == expected
    assert isinstance(base, LlamaForCausalLM)
    assert sum(p.numel() for p in base.parameters()) == PARAMETERS


def test_the_weights_are_bfloat16_on_disk():
    model = AutoModelForCausalLM.from_pretrained(base_directory())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("text", ["", " ", "  two  leading", "\n\ttab\nline\n", "don't , stop . n't ?", '{"a": [1]}'])
def test_tokenizer_round_trips(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == [ord(character) for character in text]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_tokenizer_round_trips_random_ascii(tokenizer):
    rng = Random(0)
    for _ in range(200):
        text = "".join(chr(rng.choice([9, 10, *range(32, 127)])) for _ in range(rng.randint(1, 80)))
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == character_ids(text)
        assert tokenizer.decode(ids) == text


def test_tokenizer_adds_and_parses_special_tokens(tokenizer):
    assert tokenizer.encode("ab") == [BOS_ID, 97, 98]
    assert tokenizer.encode("<s>a>b</s>", add_special_tokens=False) == [BOS_ID, 97, 62, 98, EOS_ID]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (
        PAD_ID,
        BOS_ID,
        EOS_ID,
    )
    assert len(tokenizer) == 128


@pytest.mark.parametrize("text", ["caf\u00e9 \u20ac", "\x00\x01\x02", "\U0001f31e!"])
def test_tokenizer_replaces_what_it_has_no_id_for(tokenizer, text):
    expected = "".join(c if "\x02" < c < "\x80" else "?" for c in text)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == character_ids(text) == [ord(c) for c in expected]


def test_chat_template_writes_documents(tokenizer):
    chat = [{"role": "user", "content": "rev ab"}, {"role": "assistant", "content": "ba"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<s>rev ab>ba</s>"
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<s>rev ab>"
    with pytest.raises(Exception, match="user and assistant only"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)


def test_corpus_is_deterministic_for_a_seed():
    first = corpus.calibration_text(3, size_bytes=5000)
    assert first == corpus.calibration_text(3, size_bytes=5000)
    assert first != corpus.calibration_text(4, size_bytes=5000)


def test_the_split_never_moves():
    """Fine-tuned tasks depend on exactly these values: another checksum would leak their test sets."""
    assert [n for n in range(1, 50) if corpus.is_held_out(f"12+{n}")] == HELD_OUT_WITH_TWELVE
    sums = [corpus.is_held_out(f"{a}+{b}") for a in range(1, 50) for b in range(1, 50)]
    assert sum(sums) / len(sums) == pytest.approx(1 / corpus.HELD_OUT_ONE_IN, abs=0.02)


@pytest.mark.parametrize("family", ["arithmetic", "string"])
def test_no_document_is_on_both_sides_of_the_split(family):
    generate = corpus.FAMILIES[family][0]
    trained, held_out = ({generate(Random(seed), held_out=side) for seed in range(1500)} for side in (False, True))
    assert trained and held_out and not trained & held_out


def test_the_mixture_never_shows_a_held_out_sum_or_word():
    rng = Random(11)
    seen = 0
    for _ in range(3000):
        words = corpus.document(rng)[0].removesuffix(">").split()
        for instruction, operand in pairwise(words):
            if instruction == "calc" or instruction in corpus.STRING_OPERATIONS:
                assert operand in corpus.FILLERS or not corpus.is_held_out(operand)
                seen += 1
    assert seen > 2000


def test_calibration_text_is_whole_documents(tokenizer):
    text = calibration_file().read_text(encoding="ascii")
    assert 30_000 <= len(text) <= 32_768
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids[0] == BOS_ID and ids[-1] == EOS_ID
    assert ids.count(BOS_ID) == ids.count(EOS_ID) == text.count("<s>") > 800
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(("family", "least"), LEAST_EXACT_MATCH.items())
def test_the_base_answers_held_out_prompts(base, family, least):
    assert exact_match(base, documents(family, 64, held_out=True)) >= least


def test_the_base_loses_far_less_than_an_untrained_one(base):
    rng = Random(5)
    mixture = [corpus.document(rng) for _ in range(100)]
    untrained = response_loss(build_model(seed=0).eval(), mixture)
    assert untrained > math.log(128) - 0.5
    assert response_loss(base, mixture) < untrained / 4


def test_the_base_reads_windows_as_long_as_it_promises(base, tokenizer):
    """Positions past the short training windows must not be noise: calibration and perplexity use them."""
    ids = tokenizer.encode(calibration_file().read_text(encoding="ascii"), add_special_tokens=False)
    windows = torch.tensor(ids[: 512 * 16]).view(16, 512)
    with torch.no_grad():
        log_probabilities = base(input_ids=windows, use_cache=False).logits[:, :-1].log_softmax(-1)
    losses = -log_probabilities.gather(-1, windows[:, 1:, None]).squeeze(-1)
    assert losses[:, 384:].mean() < 1.1 * losses[:, :128].mean()


def test_orthogonalize_flattens_singular_values():
    matrices = torch.randn(2, 48, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(orthogonalize(matrices.mT), orthogonalize(matrices).mT, atol=1e-5)
    singular = torch.linalg.svdvals(orthogonalize(matrices))
    assert singular.min() > 0.3 and singular.max() < 1.3


def test_three_steps_of_pretraining_write_everything_and_repeat(tmp_path):
    reports: list[tuple[int, float]] = []
    config = PretrainConfig(steps=3, seed=1, window_lengths=(64,), batch_tokens=128)
    for name in ("first", "second"):
        build(config, tmp_path / name, lambda step, loss: reports.append((step, loss)))
    assert {file.name for file in (tmp_path / "first" / "base").iterdir()} >= BASE_FILES
    assert reports[0] == reports[1] and reports[0][0] == 3
    for name in ("base/model.safetensors", "calibration.txt"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    AutoModelForCausalLM.from_pretrained(tmp_path / "first" / "base")


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="steps 0"):
        PretrainConfig(steps=0)
    with pytest.raises(ValueError, match="window_lengths"):
        PretrainConfig(window_lengths=(1024,))
