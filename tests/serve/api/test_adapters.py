"""Adapters behind HTTP: a folder of them, those that come and go, and what cannot be served."""

import json
import shutil
import threading

import pytest

import qsun
from qsun.adapters.adapter_module import AdapterLibrary
from qsun.adapters.shared_prefill import AdaptedLinear
from qsun.engine.config import EngineConfig
from qsun.engine.engine import Engine
from qsun.serve.api.app import Serving
from qsun.serve.api.metrics import Metrics
from tests.adapter_rig import merged, write_adapter
from tests.engine_rig import KV_BYTES_PER_TOKEN
from tests.serve.api.test_api import count, error_of, served, until
from tests.serve.api.test_serve_command import serving

PROMPTS = ["x", "Ann has 12 eggs and gets 8 more. How many eggs?>", "Ann has 12 eggs and gets 8 more. How many hens?>"]


@pytest.fixture(scope="module")
def folder(base_directory, tmp_path_factory):
    """Three adapters, and what is none of the server's business."""
    folder = tmp_path_factory.mktemp("folder")
    for number, name in enumerate(("math", "code.v2", "tool")):
        write_adapter(folder / name, base_directory, number)
    (folder / "notes").mkdir()
    (folder / "README.md").write_text("three adapters")
    return folder


def expected(decode, folder, name, prompt, tokens=8):
    module = qsun.PrefillModule(decode.model, folder) if name == "base" else merged(decode.model, folder / name)
    return qsun.generate(module, decode, [prompt], max_new_tokens=tokens, eos=())[0]


def ask(client, name, prompt, **settings):
    body = {"model": name, "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **settings}
    return client.post("/v1/completions", json=body)


@pytest.mark.slow
def test_a_folder_of_adapters_is_served_by_name(folder, base_directory, decode, tmp_path):
    options = ("--threads", "1", "--adapters", str(folder), "--max-adapters", "2", "--admin")
    full = ("--prefill", f"own={folder / 'math'}")  # merged, beside the others
    with serving(*options, *full, "--dtype", "float32", decode=str(base_directory)) as (_, client):
        names = {model["id"] for model in client.get("/v1/models").json()["data"]}
        assert names == {"math", "code.v2", "tool", "own", "base"}
        answers = {}

        def client_of(name):
            for prompt in PROMPTS * 2:
                answers[name, prompt] = ask(client, name, prompt).json()["choices"][0]["text"]

        threads = [threading.Thread(target=client_of, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert len(answers) == 15
        for (name, prompt), text in answers.items():
            assert text == expected(decode, folder, "math" if name == "own" else name, prompt), name
        assert count(client, "qsun_adapters ") == 2
        assert count(client, "qsun_adapter_evictions_total") >= 1
        assert count(client, "qsun_adapter_bytes") > 0
        fourth = write_adapter(tmp_path / "fourth", base_directory, 9)
        added = client.post("/admin/models", json={"name": "fourth", "directory": str(fourth)})
        assert added.status_code == 201
        assert ask(client, "fourth", PROMPTS[1]).json()["choices"][0]["text"] == expected(
            decode, tmp_path, "fourth", PROMPTS[1]
        )
        assert client.delete("/admin/models/math").json()["deleted"]
        assert ask(client, "math", "x").status_code == 404


@pytest.fixture
def server(base_directory, decode, folder):
    """An engine with the folder's adapters, and its administration."""
    metrics, library = Metrics(), AdapterLibrary(decode)
    engine = Engine(decode, EngineConfig(kv_bytes=50_000 * KV_BYTES_PER_TOKEN, max_adapters=2), metrics)
    for name in ("math", "tool"):
        engine.add_module(name, library.open(folder / name))
    with served(engine, metrics, admin=True) as client:
        client.serving.library = library
        yield client


def test_adapters_come_and_go_while_others_answer(server, folder, base_directory, decode, tmp_path):
    modules = server.serving.engine.modules
    path = write_adapter(tmp_path / "new", base_directory, 5)
    done, failures = threading.Event(), []

    def others():
        while not done.is_set():
            for name in ("math", "tool"):
                if ask(server, name, PROMPTS[0]).json()["choices"][0]["text"] != wanted[name]:
                    failures.append(name)

    wanted = {name: expected(decode, folder, name, PROMPTS[0]) for name in ("math", "tool")}
    thread = threading.Thread(target=others)
    thread.start()
    try:
        for turn in range(3):
            add = {"name": "new", "directory": str(path), "merge": turn == 1}
            assert server.post("/admin/models", json=add).status_code == 201
            assert ask(server, "new", PROMPTS[1]).json()["choices"][0]["text"] == expected(
                decode, tmp_path, "new", PROMPTS[1]
            )
            unmerged = any(isinstance(part, AdaptedLinear) for part in modules["new"].module.model.modules())
            assert unmerged is (turn != 1)
            assert 'model="new"' in server.get("/metrics").text
            assert server.delete("/admin/models/new").json()["deleted"]
            assert 'model="new"' not in server.get("/metrics").text  # series of models that are gone do not add up
    finally:
        done.set()
        thread.join(30)
    assert failures == []


def test_an_adapter_that_does_not_fit_is_refused_when_it_is_added(server, tiny_model, base_directory, tmp_path):
    other = write_adapter(tmp_path / "other", tiny_model("llama", hidden_size=32), 0)
    message = error_of(server.post("/admin/models", json={"name": "x", "directory": str(other)}), 400)
    assert "does not fit decode module" in message
    assert "base fingerprint" in message
    dora = write_adapter(tmp_path / "dora", base_directory, 0)
    config = json.loads((dora / "adapter_config.json").read_text())
    (dora / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    message = error_of(server.post("/admin/models", json={"name": "x", "directory": str(dora)}), 400)
    assert "use_dora True is not plain LoRA" in message
    rank = write_adapter(tmp_path / "rank", base_directory, 0)
    (rank / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    message = error_of(server.post("/admin/models", json={"name": "x", "directory": str(rank)}), 400)
    assert "not of rank 3" in message
    assert "x" not in server.serving.engine.modules


def test_an_adapter_whose_file_is_gone_answers_500_and_comes_back(server, base_directory, decode, tmp_path):
    path = write_adapter(tmp_path / "new", base_directory, 6)
    assert server.post("/admin/models", json={"name": "new", "directory": str(path)}).status_code == 201
    weights = path / "adapter_model.safetensors"
    shutil.move(weights, tmp_path / "aside")
    message = error_of(ask(server, "new", PROMPTS[1]), 500)
    assert message == "the model's adapter could not be loaded; the server's log says why"
    until(lambda: count(server, 'qsun_requests_total{model="new",outcome="error"}') == 1)
    shutil.move(tmp_path / "aside", weights)
    assert ask(server, "new", PROMPTS[1]).json()["choices"][0]["text"] == expected(decode, tmp_path, "new", PROMPTS[1])


def test_a_server_without_adapters_takes_them_too(make_engine, base_directory, decode, tmp_path):
    metrics = Metrics()
    path = write_adapter(tmp_path / "new", base_directory, 7)
    with served(make_engine(metrics), metrics, admin=True) as client:
        assert client.post("/admin/models", json={"name": "new", "directory": str(path)}).status_code == 201
        assert ask(client, "new", PROMPTS[1]).json()["choices"][0]["text"] == expected(
            decode, tmp_path, "new", PROMPTS[1]
        )


def broken(folder, what):
    """A folder with one good adapter and one that is not."""
    if what == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif what == "pickled":
        (folder / "bad" / "adapter_model.safetensors").rename(folder / "bad" / "adapter_model.bin")
    elif what == "cut":
        file = folder / "bad" / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-4])
    elif what == "name":
        (folder / "bad").rename(folder / "_bad")
    elif what == "weights":
        manifest = json.loads((folder / "bad" / "qsun.json").read_text())
        (folder / "bad" / "qsun.json").write_text(json.dumps(manifest | {"prefill_weights": "both"}))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("empty", "has no folder with an adapter_config.json"),
        ("pickled", "pickled adapters are not read"),
        ("cut", "is damaged"),
        ("name", "cannot be the name of a model"),
        ("weights", "prefill_weights 'both' is unknown; use 'base' or 'decode'"),
        ("taken", "--prefill names 'good'"),
        ("absent", "nowhere is not a directory"),
    ],
)
def test_a_folder_that_cannot_be_served_is_one_line(what, message, cli, base_directory, tmp_path):
    folder = tmp_path / "folder"
    for name in ("good", "bad"):
        write_adapter(folder / name, base_directory, 0)
    broken(folder, what)
    full = ["--prefill", "good=demo"] if what == "taken" else []
    adapters = "nowhere" if what == "absent" else folder
    answer = cli("serve", "--decode", base_directory, "--adapters", adapters, "--port", "0", *full)
    assert answer.code == 2
    assert message in answer.err.splitlines()[-1]


def test_ordinary_lora_is_served_with_a_warning(decode, base_directory, tmp_path, caplog):
    path = write_adapter(tmp_path / "theirs", base_directory, 0)
    (path / "qsun.json").unlink()
    serving = Serving(Engine(decode, EngineConfig(kv_bytes=1 << 20)), Metrics(), None)
    serving.engine.add_module("theirs", serving.library.open(path))
    assert "it acts on prompt tokens only" in caplog.text
