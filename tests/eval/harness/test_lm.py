"""lm-eval's model of a pair: against lm-eval's own `hf` model, and against the seam without a cache."""

import json
import shutil

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file, save_file

import qsun
from qsun.data.chat import chat_tokens
from qsun.demo import base_directory
from qsun.eval.harness.lm import CPU_BATCH, QsunLM
from tests.eval.harness.lm_requests import SPLIT_TWICE, brute_force, instances, pairs
from tests.warm_process import as_two_ranks

CPU = {"device": "cpu", "dtype": "float32"}
QUIET = {"disable_tqdm": True}
AUTO = {"batch_size": "auto", "max_batch_size": 6}  # HFLM tries them on rows of 512 positions


@pytest.fixture(autouse=True, scope="module")
def offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def perturbed(tmp_path_factory):
    """A prefill module: the embedded base with noise on every weight."""
    directory = tmp_path_factory.mktemp("perturbed") / "prefill"
    shutil.copytree(base_directory(), directory)
    file = next(directory.glob("*.safetensors"))
    r = torch.Generator().manual_seed(0)
    tensors = {
        name: t + 0.3 * t.float().std() * torch.randn(t.shape, generator=r) for name, t in load_file(file).items()
    }
    save_file({name: t.float().contiguous() for name, t in tensors.items()}, file, {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def int4(tmp_path_factory):
    directory = tmp_path_factory.mktemp("int4") / "decode"
    qsun.quantize("demo", directory, qsun.QuantConfig(method="rtn", group_size=32), device="cpu")
    return directory


def both(**settings):
    """One model on both sides of the seam, and lm-eval's own."""
    return QsunLM(decode="demo", **CPU, **settings), HFLM(pretrained=str(base_directory()), **CPU, **settings)


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for (a, a_greedy), (b, b_greedy) in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, abs=1e-4, rel=1e-6)  # a sum of float32
        assert a_greedy == b_greedy


class Recorder:
    """In place of lm-eval's cache of answers."""

    def __init__(self):
        self.keys = set()

    def add_partial(self, attribute, key, answer):
        assert isinstance(answer[0], float)
        self.keys.add((attribute, key))


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 1},
        {"batch_size": 7},
        {"batch_size": 64, "add_bos_token": True},
        {"batch_size": 5, "max_length": 40},
        {"batch_size": 5, "logits_cache": False},
        AUTO,
    ],
    ids=str,
)
def test_one_model_on_both_sides_scores_as_lm_evals_own(settings):
    lm, reference = both(**settings)
    # lm-eval 0.4.13 groups equal tokens that are split in two ways, and then reads the shorter continuation's log
    # probabilities one place too early; without its logits cache it does not.
    split_twice = [] if settings.get("logits_cache", True) else SPLIT_TWICE
    requests = instances("loglikelihood", [*split_twice, *pairs()])
    lm.cache_hook, reference.cache_hook = Recorder(), Recorder()
    expected = reference.loglikelihood(requests, **QUIET)
    assert_same(lm.loglikelihood(requests, **QUIET), expected)
    assert lm.cache_hook.keys == reference.cache_hook.keys == {("loglikelihood", one.args) for one in requests}
    assert {greedy for _, greedy in expected} == {True, False}


@pytest.mark.parametrize("settings", [{"batch_size": 2}, {"batch_size": 3, "max_length": 33}, AUTO])
def test_rolling(settings):
    lm, reference = both(**settings)
    requests = instances("loglikelihood_rolling", [("calc 12+8>20 " * n,) for n in (1, 9, 60)])
    ours, theirs = lm.loglikelihood_rolling(requests, **QUIET), reference.loglikelihood_rolling(requests, **QUIET)
    assert ours == pytest.approx(theirs, abs=1e-4, rel=1e-6)


GENERATIONS = [
    *(("calc 12+8>", {"until": []}), ("calc 12+8>", {"until": ["0"], "max_gen_toks": 9})),
    *(("rev abcd>", {"until": ["cb", "zz"]}), ("b" * 300, {"until": [], "max_gen_toks": 12})),
    *(("json foo ab=cd>", {"until": [], "max_gen_toks": n}) for n in (1, 5, 40)),
    *(("Once, ", {"until": ["</s>", "e"], "max_gen_toks": 30, "do_sample": False, "temperature": 0.7}),),
    *((f"calc {n}+{3 * n}>", {"until": [], "max_gen_toks": 16}) for n in range(1, 20)),
]


@pytest.mark.parametrize("settings", [{"batch_size": 1}, {"batch_size": 6, "max_length": 300}, AUTO])
def test_generations(settings):
    lm, reference = both(**settings)
    requests = instances("generate_until", GENERATIONS)
    answers = lm.generate_until(requests, **QUIET)
    assert answers == reference.generate_until(requests, **QUIET)
    assert answers[:3] == ["20", "2", "d"]


def test_the_prefill_module_reads_the_context_and_nothing_else(perturbed):
    lm, base = QsunLM(decode="demo", prefill=str(perturbed), batch_size=9, **CPU), both(batch_size=9)[0]
    requests = [*SPLIT_TWICE, *pairs(count=8)]
    ours = lm.loglikelihood(instances("loglikelihood", requests), **QUIET)
    encoded = [
        lm._encode_pair(*one) if one[0] else ([lm.prefix_token_id], lm.tok_encode(one[1], add_special_tokens=False))
        for one in requests
    ]
    assert_same(ours, [brute_force(lm, *one) for one in encoded])
    plain = base.loglikelihood(instances("loglikelihood", requests), **QUIET)
    assert [a == pytest.approx(b, abs=1e-3) for a, b in zip(ours, plain, strict=True)].count(True) <= 3
    rolling = instances("loglikelihood_rolling", [("calc 12+8>20",)])
    assert lm.loglikelihood_rolling(rolling, **QUIET) == base.loglikelihood_rolling(rolling, **QUIET)
    prompts = instances("generate_until", GENERATIONS[:7])
    assert lm.generate_until(prompts, **QUIET) != base.generate_until(prompts, **QUIET)


def test_a_long_documents_number_is_the_decode_modules_own(perturbed):
    """Its last window begins with text that has already been scored."""
    settings = {"batch_size": 3, "max_length": 33}
    base, reference = both(**settings)
    lm = QsunLM(decode="demo", prefill=str(perturbed), **CPU, **settings)
    requests = instances("loglikelihood_rolling", [("calc 12+8>20 " * n,) for n in (1, 4, 9)])
    ours = lm.loglikelihood_rolling(requests, **QUIET)
    assert ours == base.loglikelihood_rolling(requests, **QUIET)
    assert ours == pytest.approx(reference.loglikelihood_rolling(requests, **QUIET), abs=1e-4, rel=1e-6)
    scored = instances("loglikelihood", [("calc 12+8>", "20")])  # and the seam is where it was
    assert lm.loglikelihood(scored, **QUIET) != base.loglikelihood(scored, **QUIET)


def test_equal_tokens_with_the_seam_elsewhere_are_scored_apart(perturbed):
    lm = QsunLM(decode="demo", prefill=str(perturbed), batch_size=4, **CPU)
    tokens = lm.tok_encode("rev abc>cba")
    requests = [(None, tokens[:n], tokens[n:]) for n in (2, 5, 9)]
    ours = lm._loglikelihood_tokens(requests, **QUIET)
    assert_same(ours, [brute_force(lm, *one[1:]) for one in requests])
    last = [(None, tokens[:n], tokens[n:]) for n in (len(tokens) - 1, len(tokens) - 2)]
    assert len(lm._rows([*last, (None, tokens[:-1], [7])])) == 2  # the third shares the first one's row


def test_choices_of_one_context_are_read_once(perturbed):
    lm = QsunLM(decode="demo", prefill=str(perturbed), batch_size=8, **CPU)
    read = []
    lm.prefill_module.model.model.register_forward_pre_hook(
        lambda _, __, kwargs: read.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    lm.loglikelihood(instances("loglikelihood", [("is 1+1 2>", text) for text in ("yes", "no", "maybe")]), **QUIET)
    assert read == [1]


def test_a_quantized_decode_module_is_paired_with_its_base(int4):
    lm, base = QsunLM(decode=str(int4), batch_size=6, **CPU), both(batch_size=6)[0]
    assert lm.prefill_module.directory == base_directory()
    encoded = [
        (lm.tok_encode(context or "a"), lm.tok_encode(rest, add_special_tokens=False)) for context, rest in pairs(6)
    ]
    ours = lm._loglikelihood_tokens([(None, *one) for one in encoded], **QUIET)
    for (a, _), one in zip(ours, encoded, strict=True):
        assert a == pytest.approx(brute_force(lm, *one)[0], abs=2e-4)
    assert ours != base._loglikelihood_tokens([(None, *one) for one in encoded], **QUIET)
    assert lm.generate_until(instances("generate_until", GENERATIONS[:1]), **QUIET) == ["20"]
    assert lm.get_model_info()["prefill_module"] == str(base_directory())


def test_modules_of_different_dtypes(perturbed, int4):
    lm = QsunLM(decode=str(int4), prefill=str(perturbed), device="cpu", batch_size=4)
    assert (lm.prefill_module.model.dtype, lm.model.dtype) == (torch.float32, torch.bfloat16)
    ((value, _),) = lm.loglikelihood(instances("loglikelihood", [("calc 12+8>", "20")]), **QUIET)
    exact = brute_force(lm, lm.tok_encode("calc 12+8>"), lm.tok_encode("20", add_special_tokens=False))[0]
    assert value == pytest.approx(exact, abs=0.1)


def test_automatic_batch_sizes(monkeypatch):
    assert QsunLM(decode="demo", batch_size="auto", **CPU)._detect_batch_size() == CPU_BATCH
    lm = QsunLM(decode="demo", batch_size="auto", max_batch_size=20, **CPU)
    assert lm._detect_batch_size() == 20 < CPU_BATCH
    tried = []

    def read(examples):
        tried.append(len(examples))
        assert len({example.prompt for example in examples}) == len(examples)
        if len(examples) > 5:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return []

    monkeypatch.setattr(lm, "_read", read)
    monkeypatch.setattr(lm, "_device", torch.device("cuda"))
    assert 1 <= lm._detect_batch_size([(None, [1, 2], [3]), (None, [1], [2, 3, 4])]) <= 5
    assert max(tried) == 20


@pytest.fixture(scope="module")
def special_letter(tmp_path_factory):
    """The embedded base, whose letter e is a special token without a role, as <|eot_id|> and <|im_end|> may be."""
    directory = tmp_path_factory.mktemp("special") / "base"
    shutil.copytree(base_directory(), directory)
    file = directory / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    added = tokenizer["added_tokens"]
    added.append({**added[-1], "id": tokenizer["model"]["vocab"]["e"], "content": "e"})
    file.write_text(json.dumps(tokenizer))
    return str(directory)


@pytest.mark.parametrize("until", [[], ["e"], ["e "], ["he"], ['me":', "</s>"], ["e", 'e"', "q"], ["("]], ids=str)
def test_stop_strings_with_special_tokens(special_letter, until):
    lm, reference = QsunLM(decode=special_letter, **CPU), HFLM(pretrained=special_letter, **CPU)
    assert "e" not in lm.tokenizer.all_special_tokens
    prompts = ("Once, ", "json foo ab=cd>", "the ")
    requests = instances("generate_until", [(prompt, {"until": until, "max_gen_toks": 30}) for prompt in prompts])
    answers = lm.generate_until(requests, **QUIET)
    assert answers == reference.generate_until(requests, **QUIET)
    without = instances("generate_until", [(prompt, {"until": [], "max_gen_toks": 30}) for prompt in prompts])
    if any("e" in stop for stop in until):
        assert answers != lm.generate_until(without, **QUIET)


def test_chats_are_the_tokens_that_serving_renders():
    """The demo's tokenizer adds a first token to text; this template writes none, so the prompt has none."""
    lm = QsunLM(decode="demo", **CPU)
    lm.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}[{{ m.content }}]"
        "{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    assert lm.tok_encode("a")[0] == lm.tokenizer.bos_token_id
    chat = [{"role": "user", "content": "ab"}]
    text = lm.apply_chat_template(chat)
    assert lm.tok_encode(text) == lm.tok_batch_encode([text])[0][0].tolist() == chat_tokens(lm.tokenizer, chat)
    assert lm.apply_chat_template([{"role": "system", "content": "x"}, *chat]) == text == "[ab]>"
    lm.tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(qsun.QsunError, match="refuses these messages"):
        lm.apply_chat_template(chat)


def test_sampling_is_seeded_and_repeats_differ():
    lm = QsunLM(decode="demo", batch_size=8, **CPU)
    sampled = {"until": [], "max_gen_toks": 20, "do_sample": True, "temperature": 1.5, "top_p": 0.9, "top_k": 40}
    requests = instances("generate_until", [("the ", sampled)] * 16)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(lm.generate_until(requests, **QUIET))
    assert runs[0] == runs[1] != runs[2]
    assert len(set(runs[0])) > 8


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "no decode module; give --model_args decode=DIR"),
        ({"decode": "demo", "prefil": "x"}, "unknown model argument 'prefil'; known are: decode, prefill"),
        ({"decode": "demo", "batch_size": "0"}, "batch_size '0' is out of range"),
        ({"decode": "demo", "dtype": "int3"}, "dtype 'int3' is not supported; use one of auto, float32"),
        ({"decode": "demo", "device": "gpu"}, "device 'gpu' is not known"),
        ({"decode": "demo", "max_length": 1000}, "max_length 1000 is over the model's 512 positions; use 512"),
        ({"decode": "nowhere"}, "nowhere is not a directory"),
    ],
)
def test_what_is_refused(settings, says):
    with pytest.raises(qsun.QsunError, match=says):
        QsunLM(**({"device": "cpu"} | settings))


def test_a_wrong_pair_and_a_missing_base_are_refused(tiny_model, int4, tmp_path):
    with pytest.raises(qsun.QsunError, match="does not fit decode module"):
        QsunLM(decode=str(int4), prefill=str(tiny_model("llama")), device="cpu")
    shutil.copytree(int4, tmp_path / "moved")
    made = json.loads((tmp_path / "moved/qsun.json").read_text())
    (tmp_path / "moved/qsun.json").write_text(json.dumps(made | {"base": "gone-base"}))
    with pytest.raises(
        qsun.QsunError, match="names gone-base as its base, which was not found; give --model_args prefill"
    ):
        QsunLM(decode=str(tmp_path / "moved"), device="cpu")
    (tmp_path / "moved/qsun.json").write_text(json.dumps(made | {"base": str(tiny_model("llama"))}))
    with pytest.raises(qsun.QsunError, match=r"is not the base that .*moved was made from"):
        QsunLM(decode=str(tmp_path / "moved"), device="cpu")
    with pytest.raises(qsun.QsunError, match="has no tokenizer"):
        QsunLM(decode=str(tiny_model("llama")), device="cpu")


def test_what_cannot_be_answered_is_refused():
    lm = QsunLM(decode="demo", max_length=40, **CPU)
    with pytest.raises(qsun.QsunError, match="1 context and 41 continuation tokens"):
        lm._loglikelihood_tokens([(None, [1], [5] * 41)], **QUIET)
    with pytest.raises(qsun.QsunError, match="generation setting num_beams=4 is not supported; use do_sample, temp"):
        lm.generate_until(
            instances("generate_until", [("a", {"until": [], "max_gen_toks": 3, "num_beams": 4})]), **QUIET
        )
    with pytest.raises(qsun.QsunError, match="max_gen_toks 40 leaves no room for a prompt in max_length 40; use 39"):
        lm.generate_until(instances("generate_until", [("a", {"until": [], "max_gen_toks": 40})]), **QUIET)


@pytest.mark.slow
def test_two_processes_share_the_work(int4, tmp_path, monkeypatch):
    """As `accelerate launch` starts them."""
    from tests.eval.harness.lm_in_parallel import save_scores, scores

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    done, said = as_two_ranks(save_scores, int4, tmp_path / "scores")
    assert done, said[-3000:]
    found = json.loads((tmp_path / "scores.0").read_text())
    assert found["world_size"] == 2
    assert json.loads((tmp_path / "scores.1").read_text()) is None
    alone = scores(str(int4))[1]["answers"]
    assert {name: {int(number): a for number, a in rows.items()} for name, rows in found["answers"].items()} == alone
