"""`qsun route` as a process: a real file, real modules, signals."""

import asyncio
import json
import shutil
import signal
import time
from contextlib import asynccontextmanager

import httpx
import pytest
import yaml

from qsun.serve.cluster.modules import ModuleChecks
from qsun.serve.cluster.names import served_name
from tests.serve.fake_vllm import FakeWorker, expected_text
from tests.serve.routing import QUICK, run, until
from tests.tiny_models import build_model
from tests.warm_process import qsun_process

START_SECONDS = 120  # torch and transformers are imported, on a machine that may be busy


@pytest.fixture(scope="module")
def modules(talking_model, tmp_path_factory):
    """A decode module and two prefill modules with weights of their own, and the names under which they are served."""
    home = tmp_path_factory.mktemp("modules")
    shutil.copytree(talking_model, home / "decode")
    for seed, name in enumerate(("math", "code"), 1):
        build_model(home / name, "llama", seed=seed)
        for pattern in ("tokenizer*", "chat_template*"):
            for file in talking_model.glob(pattern):
                shutil.copyfile(file, home / name / file.name)
    return home, {name: served_name(ModuleChecks().fingerprint(home / name)) for name in ("decode", "math", "code")}


def write(home, workers, **more):
    """cluster.yaml beside the modules, whose directories it names relative to itself."""
    pools = {name: {"module": name, "workers": [w.url for w in pool]} for name, pool in workers.items()}
    values = {"listen": {"port": 0}, "decode": pools.pop("decode"), "models": pools, "health": QUICK} | more
    file = home / "cluster.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@asynccontextmanager
async def fakes(modules, *wanted):
    _, names = modules
    network, workers = {}, {}
    for name in wanted:
        role = "decode" if name == "decode" else "prefill"
        worker = FakeWorker(role, f"weights of {name}", names[name], network)
        await worker.start()
        workers.setdefault(name, []).append(worker)
    try:
        yield workers
    finally:
        for worker in [worker for pool in workers.values() for worker in pool]:
            worker.gate = None
            await worker.stop()


@asynccontextmanager
async def routed(file):
    """The process and a client of it; its log is in `process.log`."""
    with qsun_process("route", file, "--json") as process:
        process.log = []

        def follow():
            for line in process.stderr:
                process.log.append(line)

        following = asyncio.create_task(asyncio.to_thread(follow))
        url = json.loads(await asyncio.wait_for(asyncio.to_thread(process.stdout.readline), START_SECONDS))["url"]
        try:
            async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=30) as client:
                yield process, client
        finally:
            process.kill()
            await following


async def until_ready(client):
    for _ in range(1000):
        if (await client.get("/ready")).status_code == 200:
            return
        await asyncio.sleep(0.02)
    raise AssertionError((await client.get("/ready")).text)


async def complete(client, model, prompt="a b c", max_tokens=3):
    return await client.post("/v1/completions", json={"model": model, "prompt": prompt, "max_tokens": max_tokens})


@pytest.mark.slow
def test_reload_by_sighup_and_drain_by_sigterm(modules):
    home, _ = modules

    async def scenario():
        async with fakes(modules, "decode", "decode", "math", "code") as workers:
            first, second = workers["decode"]
            file = write(home, {"decode": [first], "math": workers["math"]})
            async with routed(file) as (process, client):
                await until_ready(client)
                answer = await complete(client, "math")
                assert answer.json()["choices"][0]["text"] == expected_text("weights of math", "a b c", 3)
                assert (await complete(client, "code")).status_code == 404

                file.write_text("models: [")
                process.send_signal(signal.SIGHUP)
                await until(lambda: any("is not applied; keeping the old file" in line for line in process.log))
                assert (await complete(client, "math")).status_code == 200

                write(home, {"decode": [second], "math": workers["math"], "code": workers["code"]})
                process.send_signal(signal.SIGHUP)
                await until(lambda: any("is applied: 3 workers" in line for line in process.log))
                await until_ready(client)
                before = first.started
                answer = await complete(client, "code")
                assert answer.json()["choices"][0]["text"] == expected_text("weights of code", "a b c", 3)
                assert first.started == before

                second.gate = asyncio.Event()
                running = asyncio.create_task(complete(client, "math", max_tokens=5))
                sent = second.started
                await until(lambda: second.started > sent)
                process.send_signal(signal.SIGTERM)
                await until(lambda: any("draining: 1 requests" in line for line in process.log))
                assert (await client.get("/ready")).status_code == 503
                assert (await complete(client, "math")).status_code == 503
                second.gate.set()
                answer = await running
                assert answer.json()["choices"][0]["text"] == expected_text("weights of math", "a b c", 5)
                assert await asyncio.to_thread(process.wait, 15) == 0

    run(scenario, 4 * START_SECONDS)


@pytest.mark.slow
def test_a_request_that_outlasts_the_drain_is_cut_off(modules):
    home, _ = modules

    async def scenario():
        async with fakes(modules, "decode", "math") as workers:
            file = write(home, workers, limits={"drain_seconds": 0.3})
            async with routed(file) as (process, client):
                await until_ready(client)
                workers["decode"][0].gate = asyncio.Event()
                sent = workers["decode"][0].started
                whole = asyncio.create_task(complete(client, "math"))
                await until(lambda: workers["decode"][0].started == sent + 1)
                workers["decode"][0].gate = None
                workers["decode"][0].token_seconds = 0.05
                body = {"model": "math", "prompt": "a b", "max_tokens": 1000, "stream": True}
                async with client.stream("POST", "/v1/completions", json=body) as response:
                    lines = response.aiter_lines()
                    assert "choices" in await anext(lines)
                    process.send_signal(signal.SIGTERM)
                    last = [line async for line in lines if line][-1]
                assert json.loads(last[6:])["error"]["code"] == 503
                answer = await whole
                assert answer.status_code == 503
                assert "shut down" in answer.json()["error"]["message"]
                assert await asyncio.to_thread(process.wait, 15) == 0

    run(scenario, 4 * START_SECONDS)


POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SPLIT = POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"


@pytest.mark.slow
def test_connections_of_the_process(modules):
    """A half-closed client gets its answer, two lengths end a connection, small answers on a kept one do not wait."""
    home, _ = modules

    async def scenario():
        async with fakes(modules, "decode", "math") as workers, routed(write(home, workers)) as (_, client):
            await until_ready(client)
            address = client.base_url.host, client.base_url.port

            async def exchange(request, half_close):
                reader, writer = await asyncio.open_connection(*address)
                writer.write(request)
                if half_close:
                    writer.write_eof()
                answer = await asyncio.wait_for(reader.read(), 30)
                writer.close()
                return answer

            body = json.dumps({"model": "math", "prompt": "a b", "max_tokens": 2}).encode()
            head = POST + b"Content-Length: %d\r\n\r\n" % len(body)
            assert expected_text("weights of math", "a b", 2).encode() in await exchange(head + body, half_close=True)
            answers = await exchange(SPLIT + b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n", half_close=False)
            assert answers.count(b"HTTP/1.1 ") == 1
            waits = []
            for _ in range(15):
                started = time.monotonic()
                await client.get("/v1/models")
                waits.append(time.monotonic() - started)
            assert min(waits) < 0.03  # with Nagle's algorithm each of them takes 40 ms

    run(scenario, 4 * START_SECONDS)


@pytest.mark.slow
def test_check_says_which_worker_is_wrong(modules):
    home, names = modules

    async def scenario():
        async with fakes(modules, "decode", "math") as workers:
            file = write(home, workers)

            async def check(*more):
                with qsun_process("route", file, "--check", *more) as process:
                    out = await asyncio.to_thread(process.stdout.read)
                    return process.wait(START_SECONDS), out

            code, out = await check("--json")
            assert (code, json.loads(out)["ok"]) == (0, True)
            workers["math"][0].served_name = "another-module"
            code, out = await check()
            assert code == 2
            assert f"it serves another-module and not {names['math']}" in out

    run(scenario, 4 * START_SECONDS)


UNSERVED = {
    "decode is missing; add it": "models: {}",
    "let `qsun up` start that many": "decode: {module: demo, workers: 1}\nmodels: {m: {module: demo, workers: 1}}",
    "is not a directory": "decode: {module: x, workers: ['http://h']}\nmodels: {m: {module: y, workers: ['http://i']}}",
}


@pytest.mark.parametrize(("message", "text"), UNSERVED.items(), ids=UNSERVED)
def test_a_file_that_cannot_be_served_is_one_line_and_code_2(cli, tmp_path, text, message):
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    answer = cli("route", file)
    assert answer.code == 2
    assert message in answer.err
    assert len(answer.err.splitlines()) == 1


def test_check_takes_the_keys_in_too(cli, tmp_path):
    (tmp_path / "keys").write_text("short\n")
    pools = "decode: {module: demo, workers: ['http://h']}\nmodels: {m: {module: demo, workers: ['http://i']}}"
    file = tmp_path / "cluster.yaml"
    file.write_text(pools + "\nlisten: {api_keys: keys}\nhealth: {timeout_seconds: 0.1}")
    answer = cli("route", file, "--check")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "an API key of 5 characters is invalid" in answer.err
