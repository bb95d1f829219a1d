"""Finding models and reading their tokenizers; what is missing is a one-line error."""

import json
import shutil

import huggingface_hub
import pytest
import transformers
from huggingface_hub.utils import filter_repo_objects

from qsun.demo import base_directory
from qsun.errors import QsunError
from qsun.model import locate
from qsun.model.locate import load_tokenizer


def test_a_directory_without_a_tokenizer(tmp_path):
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize("name", ["./nope", "../nope", "nope", "/nowhere/model", "a/b/c"])
def test_a_path_is_not_asked_of_the_hub(name, monkeypatch):
    monkeypatch.setattr(locate, "_download", lambda name: pytest.fail(f"{name} was downloaded"))
    with pytest.raises(QsunError, match=f"{name} is not a directory: it does not exist; give a"):
        locate.find_model(name)


def test_a_model_id_is(monkeypatch, tmp_path):
    monkeypatch.setattr(locate, "_download", lambda _: tmp_path)
    assert locate.find_model("owner/.name-1") == tmp_path


def test_the_same_weights_are_not_downloaded_twice(monkeypatch, tmp_path):
    """The Hub's patterns match slashes: *.safetensors is in every folder."""
    files = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model"]
    files += ["adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "LICENSE.txt"]
    others = ["consolidated.safetensors", "consolidated.00.pth", "original/consolidated.00.safetensors", "a.bin"]
    others += ["checkpoint-500/model.safetensors", "checkpoint-500/config.json", "onnx/tokenizer.json"]
    downloaded = []

    def snapshot_download(_, **patterns):
        downloaded.extend(filter_repo_objects(files + others, **patterns))
        return tmp_path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert locate.find_model("owner/name") == tmp_path
    assert downloaded == files


def test_a_tokenizer_of_a_later_version(tmp_path):
    """The tokenizers library raises bare Exceptions for what it does not know."""
    shutil.copyfile(base_directory() / "tokenizer_config.json", tmp_path / "tokenizer_config.json")
    values = json.loads((base_directory() / "tokenizer.json").read_text())
    values["model"]["type"] = "NextYearsModel"
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(QsunError, match=r"made for later versions than transformers \d.*, tokenizers \d") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lacking", [["sentencepiece"], ["google.protobuf"], ["sentencepiece", "google.protobuf"]])
def test_sentencepiece_without_its_packages(lacking, tmp_path, monkeypatch):
    """As transformers does where they are absent; here they may be installed, and then it reads the file."""

    def without_packages(*_, **__):
        raise ImportError("requires the library")

    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x00")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", without_packages)
    monkeypatch.setattr(locate, "_installed", lambda name: name not in lacking)
    with pytest.raises(
        QsunError, match=r"tokenizer\.model needs packages that are not installed; pip install "
    ) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).endswith(" ".join(lacking).replace("google.", ""))


def test_a_damaged_sentencepiece_model(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"rubbish")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    monkeypatch.setattr(locate, "_installed", lambda _: True)
    with pytest.raises(QsunError, match="the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)
