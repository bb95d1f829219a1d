"""The load generator against a server whose delays, counts and faults are known."""

import asyncio
import json
import math
import statistics
from dataclasses import replace

import httpx
import pytest

from qsun.errors import QsunError
from qsun.eval.load import client
from qsun.eval.load.client import NOT_SENT, PlannedRequest, Record, Target, send
from qsun.eval.load.generator import closed_loop, open_loop
from qsun.eval.load.plan import Pieces, PromptSource, plan_requests, probe_pieces, read_prompts, served_models
from qsun.eval.load.report import geometric_means, load_summary, ratios
from qsun.eval.load.rounds import OURS, THEIRS, LoadSettings, load_result, run_load
from qsun.eval.load.service_level import ServiceLevel
from qsun.eval.load.workload import Lengths, Workload, read_trace
from tests.tiny_models import write_jsonl

FOUR = Lengths("fixed", 4)


def due(arrival=0.0, model="math", tokens=4):
    return PlannedRequest(arrival, model, {"prompt": "a b c"}, tokens)


def quiet(*_):
    return None


def opened(target, planned, most=100):
    return asyncio.run(open_loop(target, planned, most, quiet))


class Clock:
    """A clock that only a test advances."""

    def __init__(self):
        self.now = 5.0

    def perf_counter(self):
        return self.now


def test_ttft_and_tpot_are_the_servers_delays(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(client, "time", clock)

    async def events():
        for delay in (0.15, 0.03, 0.03, 0.06):
            clock.now += delay
            yield b'data: {"choices": [{"text": "x", "finish_reason": null}]}\n\n'
        clock.now += 1.0  # what comes after the last token is not part of it
        yield b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}\n\ndata: [DONE]\n\n'

    def answer(_):
        clock.now += 0.05
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, content=events())

    async def once():
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as sender:
            clock.now += 0.5  # the load generator is late
            return await send(sender, Target("http://127.0.0.1:9"), due(0.25), 5.0)

    record = asyncio.run(once())
    assert (record.error, record.status, record.output_tokens, record.prompt_tokens) == ("", 200, 4, 3)
    assert (record.sent, record.first, record.last, record.ended) == pytest.approx((0.5, 0.7, 0.82, 1.82))
    assert (record.lag_ms, record.ttft_ms, record.ttft_from_send_ms) == pytest.approx((250, 450, 200))
    assert (record.tpot_ms, record.e2e_ms) == pytest.approx((40, 570))


def test_delays_of_a_real_server_are_not_underestimated(serving):
    with serving(first_s=0.15, each_s=0.03) as server:
        records = opened(Target(server.url), [due(0.05 * i, tokens=4) for i in range(3)])
    assert [(r.error, r.status, r.output_tokens, r.prompt_tokens) for r in records] == [("", 200, 4, 3)] * 3
    for r in records:
        assert r.ttft_ms >= 149 and r.tpot_ms >= 29
        assert r.arrival <= r.sent < r.first < r.last <= r.ended


def test_arrivals_do_not_wait_for_a_stalled_server(serving):
    """Nothing is answered until all requests are sent: a loop that waited for an answer would never get that far."""
    planned = [due(0.05 * i) for i in range(30)]
    with serving(stall=True) as server:

        async def watch():
            load = asyncio.create_task(open_loop(Target(server.url), planned, 100, quiet))
            while len(server.seen) < len(planned):
                await asyncio.sleep(0.01)
            server.release()
            return await load

        records = asyncio.run(asyncio.wait_for(watch(), 120))
    assert [r.error for r in records] == [""] * 30
    assert [r.arrival for r in records] == [one.arrival for one in planned]
    last_sent = max(r.sent for r in records)
    assert last_sent < min(r.first for r in records)
    # a request that was due early waited longer, and its latency says so
    assert records[0].ttft_ms > records[-1].ttft_ms + 300


def test_what_is_too_much_is_counted_and_not_delayed(serving):
    with serving(stall=True) as server:

        async def watch():
            planned, done = [due(0.01 * i) for i in range(10)], []
            load = asyncio.create_task(open_loop(Target(server.url), planned, 3, lambda *seen: done.append(seen)))
            while len(server.seen) < 3 or len(done) < 7:  # all others were due and must not be sent later
                await asyncio.sleep(0.01)
            server.release()
            return await load

        records = asyncio.run(asyncio.wait_for(watch(), 120))
        assert len(server.seen) == 3
    assert [r.error for r in records] == [""] * 3 + [NOT_SENT] * 7
    summary = load_summary([records], ServiceLevel(), 1)
    assert (summary["complete"], summary["not_sent"], summary["goodput"]) == (3, 7, 0.3)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("http 503", "http 503"),
        ("cut short", "cut short"),
        ("error in the stream", "error in the stream"),
        ("connection broken", "connection broken"),
        ("not JSON", "an event is not JSON"),
        ("not a stream", "not a stream"),
        ("silence", "deadline"),
    ],
)
def test_faults_are_counted_by_kind_and_spoil_nothing_else(serving, fault, kind):
    with serving(fault={"code": fault}) as server:
        target = Target(server.url, deadline_s=5.0 if fault == "silence" else 120.0)
        records = opened(target, [due(model=model, tokens=6) for model in ("math", "code", "tool")])
    assert [r.error for r in records] == ["", kind, ""]
    summary = load_summary([records], ServiceLevel(), 1)
    assert summary["errors"] == {kind: 1}
    assert summary["output_tokens"] == 12
    assert summary["models"]["code"]["complete"] == 0


@pytest.mark.parametrize(
    "event",
    [
        '{"choices": [null]}',
        '{"choices": 5}',
        '{"choices": ["x"]}',
        '{"choices": [{"token_ids": 7}]}',
        '{"choices": [{"delta": "x"}]}',
        '{"usage": "x"}',
        '{"usage": {"completion_tokens": "x"}}',
        '{"usage": {"prompt_tokens": 1.5}}',
        '{"usage": {"completion_tokens": -1}}',
        '{"usage": {"completion_tokens": true}}',
        '{"usage": {"completion_tokens": 1' + "0" * 5000 + "}}",
    ],
)
def test_events_of_another_shape_are_faults_of_their_requests_alone(serving, event):
    with serving(fault={"code": "odd event"}, odd=event) as server:
        records = opened(Target(server.url), [due(model=model, tokens=6) for model in ("math", "code", "tool")])
    assert [bool(r.error) for r in records] == [False, True, False]
    assert records[1].error.startswith(("choices are not", "usage.", "an event is not JSON"))
    assert load_summary([records], ServiceLevel(), 1)["errors"] == {records[1].error: 1}


def test_an_event_that_nests_too_deep(serving):
    with serving(fault={"math": "odd event"}, odd="[" * 100_000) as server:
        assert opened(Target(server.url), [due(tokens=6)])[0].error == "an event is not JSON"


@pytest.mark.parametrize(
    ("raised", "kind"), [(httpx.InvalidURL("x"), "invalid address"), (httpx.StreamClosed(), "connection broken")]
)
def test_what_httpx_raises_beside_its_http_errors(raised, kind):
    def fail(_):
        raise raised

    async def once():
        async with httpx.AsyncClient(transport=httpx.MockTransport(fail)) as client:
            return await send(client, Target("http://127.0.0.1:9"), due(), 0.0)

    assert asyncio.run(once()).error == kind


def test_no_server_is_no_connection(serving):
    with serving() as server:
        url = server.url
    assert opened(Target(url), [due()])[0].error == "no connection"
    with pytest.raises(QsunError, match="does not answer"):
        asyncio.run(served_models(Target(url)))


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_bodies_and_the_api_key(serving, endpoint):
    with serving() as server:
        target = Target(server.url + "/v1/", endpoint, "secret", {"ignore_eos": True})
        what = {"messages": [{"role": "user", "content": "a b"}]} if endpoint == "chat" else {"prompt": "a b"}
        record = opened(target, [PlannedRequest(0.0, "math", what, 5)])[0]
        _, headers, body = server.seen[0]
    assert (record.error, record.output_tokens) == ("", 5)
    assert record.ttft_ms >= 19  # the role, which comes at once in a chat, is no token
    assert headers["authorization"] == "bearer secret"
    assert (body["model"], body["max_tokens"], body["stream"], body["ignore_eos"]) == ("math", 5, True, True)
    assert body["stream_options"] == {"include_usage": True}
    assert "secret" not in repr(target)


def test_without_usage_chunks_are_tokens(serving):
    with serving(usage=False) as server:
        record = opened(Target(server.url), [due(tokens=7)])[0]
        assert asyncio.run(probe_pieces(Target(server.url), "math")) is None
    assert (record.output_tokens, record.prompt_tokens) == (7, None)


def test_a_closed_loop_keeps_its_number_in_flight(serving):
    with serving(first_s=0.05, each_s=0.01) as server:
        planned = [due(0.0) for _ in range(20)]
        records = asyncio.run(closed_loop(Target(server.url), planned, 4, quiet))
    changes = sorted([(r.sent, 1) for r in records] + [(r.ended, -1) for r in records])
    depth, depths = 0, []
    for _, change in changes:
        depth += change
        depths.append(depth)
    assert max(depths) == 4
    assert statistics.median(depths) >= 3
    first, last = (end(records, key=lambda record: record.sent) for end in (min, max))
    assert last.lag_ms < 1000 * (last.sent - first.sent), "it was late for its turn, not for the start"


def test_prompts_have_the_asked_length_for_a_tokenizer_that_is_probed(serving):
    with serving(tokens_per_letter=2, template_tokens=9) as server:
        target = Target(server.url, "chat")
        pieces = asyncio.run(probe_pieces(target, "math"))
        assert (pieces.fixed, pieces.each) == pytest.approx((9, 2))
        workload = Workload(("math",), 0, Lengths("uniform", 11, 99), FOUR)
        planned = plan_requests(workload, PromptSource("chat", pieces), 100.0, 12, 0, "x")
        records = opened(target, planned)
    wanted = [request.prompt_tokens for request in workload.trace(100.0, 12)]
    assert all(abs(r.prompt_tokens - tokens) <= 1 for r, tokens in zip(records, wanted, strict=True))
    assert Pieces(9, 2).count(1) == 1


def test_a_plan_is_the_workloads_trace_and_repeats():
    workload = Workload(("a", "b", "c"), 1.0, Lengths("uniform", 2, 9), Lengths("uniform", 1, 9))
    planned = plan_requests(workload, PromptSource("completions"), 5.0, 40, 10, "x")
    assert planned == plan_requests(workload, PromptSource("completions"), 5.0, 40, 10, "x")
    other = plan_requests(workload, PromptSource("completions"), 5.0, 40, 10, "y")
    assert all(a.fields != b.fields or len(a.fields["prompt"]) < 4 for a, b in zip(planned, other, strict=True))
    trace = workload.trace(5.0, 50)
    assert [(p.arrival, p.model, p.max_tokens) for p in planned] == [
        (r.arrival, r.model, r.output_tokens) for r in trace
    ]
    assert [len(p.fields["prompt"].split()) for p in planned] == [request.prompt_tokens for request in trace]
    assert [p.warm_up for p in planned] == [True] * 10 + [False] * 40


def test_prompts_of_a_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "x", "model": "tool", "max_tokens": 3, "other": 1}\n')
    rows = read_prompts(path, "completions")
    workload = Workload(("a",), 0, FOUR, FOUR)
    assert plan_requests(workload, PromptSource("completions", rows=rows), math.inf, 1, 0, "x") == [
        PlannedRequest(0.0, "tool", {"prompt": "x"}, 3)
    ]
    assert read_prompts(path, "chat")[0]["messages"] == [{"role": "user", "content": "x"}]
    for text, problem in (
        ("", "no rows"),
        ('{"text": "x"}', "line 1: no 'prompt'"),
        ('{"prompt": "x", "max_tokens": 0}', "line 1: max_tokens 0"),
        ('{"prompt": "x", "model": 3}', "not text"),
        ('{"prompt": "\\ud83d"}', "line 1: .* is half of a surrogate pair"),
        ('{"prompt": ["a", "\\ud83d"]}', "line 1: .* is half of a surrogate pair"),
        ('{"prompt": NaN}', "line 1: NaN and Infinity are not JSON"),
    ):
        path.write_text(text)
        with pytest.raises(QsunError, match=problem):
            read_prompts(path, "completions")
    path.write_text('{"messages": [{"role": "user", "content": "\\ud83d"}]}')
    with pytest.raises(QsunError, match=r"line 1: .* is half of a surrogate pair"):
        read_prompts(path, "chat")


def made(arrival, ttft, tpot, tokens, model="a", **more):
    first = arrival + ttft
    last = first + tpot * (tokens - 1)
    return Record(arrival, model, False, arrival, first, last, last, 10, tokens, 200, **more)


def test_the_summary_by_hand():
    """Two good answers, one slow to begin, one slow to go on, one failed; the warm-up does not count."""
    records = [
        Record(0.0, "a", True, 0.0, error="http 500"),
        made(1.0, 0.1, 0.01, 11),
        made(2.0, 0.1, 0.01, 1, "b"),
        made(3.0, 0.6, 0.01, 11),
        made(4.0, 0.1, 0.06, 11),
        Record(5.0, "b", False, 5.0, ended=6.0, error="deadline"),
    ]
    summary = load_summary([records], ServiceLevel(500, 50), 2)
    assert summary["seconds"] == pytest.approx(4.0)  # the failed one's arrival, not the second until it was given up
    assert (summary["requests"], summary["complete"], summary["output_tokens"]) == (5, 4, 34)
    assert summary["goodput"] == pytest.approx(2 / 5)
    assert summary["goodput_requests_per_s"] == pytest.approx(0.5)
    assert summary["tokens_per_s"] == pytest.approx(34 / 4)
    assert summary["tokens_per_s_per_decode_worker"] == pytest.approx(4.25)
    assert summary["steady_tokens_per_s"] == pytest.approx(34 / 4)
    assert summary["ttft_ms"] == pytest.approx({"mean": 225, "p50": 100, "p90": 600, "p99": 600})
    assert summary["tpot_ms"]["mean"] == pytest.approx(80 / 3)
    assert summary["models"]["b"]["tpot_ms"] is None
    assert summary["models"]["b"]["errors"] == {"deadline": 1}
    double = load_summary([records, records], ServiceLevel(500, 50), 2)
    assert double["seconds"] == pytest.approx(8.0)
    assert double["tokens_per_s"] == pytest.approx(summary["tokens_per_s"])


def test_ratios_and_their_means():
    ours, theirs = (load_summary([[made(0.0, 0.1 * n, 0.01 * n, 11)]], ServiceLevel(), 1) for n in (1, 2))
    found = ratios(ours, theirs)
    assert found["ttft_ms_p50"] == found["tpot_ms_p99"] == pytest.approx(0.5)
    assert found["tokens_per_s"] == pytest.approx(2)
    assert geometric_means([{"x": 0.5}, {"x": 2.0}, {"x": None}]) == {"x": pytest.approx(1.0)}
    assert geometric_means([{"x": None}]) == {"x": None}


def test_a_server_that_answers_nothing_wins_nothing():
    good = load_summary([[made(0.0, 0.1, 0.01, 11)]], ServiceLevel(), 1)
    failed = [Record(0.0, "a", False, 0.0, ended=1.0, error="http 500"), Record(1.0, "a", False, 1.0, error="http 500")]
    dead = load_summary([failed], ServiceLevel(), 1)
    times = dict.fromkeys(f"{name}_{point}" for name in ("ttft_ms", "tpot_ms") for point in ("p50", "p99"))
    lost = ratios(dead, good)
    assert lost == {"tokens_per_s": 0.0, "goodput": 0.0} | times
    assert ratios(good, dead) == {"tokens_per_s": None, "goodput": None} | times
    means = geometric_means([ratios(good, good), lost])
    assert (means["tokens_per_s"], means["goodput"], means["ttft_ms_p50"]) == (0.0, 0.0, pytest.approx(1.0))


def test_waiting_for_a_failure_does_not_count_as_serving():
    stuck = Record(2.0, "a", False, 2.0, ended=122.0, error="deadline")
    summary = load_summary([[made(1.0, 0.1, 0.1, 31), stuck]], ServiceLevel(), 1)
    assert summary["seconds"] == pytest.approx(3.1)
    assert load_summary([[stuck, stuck]], ServiceLevel(), 1)["seconds"] == pytest.approx(0.0, abs=1e-6)


def sent(server):
    """Bodies of the requests of a load."""
    return [body for _, _, body in server.seen if body.get("stream")]


def test_a_second_run_sends_other_prompts_of_the_same_lengths(serving):
    """A server that kept the prompts of the first run would find none of them again, unless their seed is given."""
    settings = LoadSettings(Lengths("uniform", 8, 20), FOUR, rate=200.0, requests=9, warm_up=1)
    runs = []
    for one in (settings, settings, replace(settings, prompt_seed="x"), replace(settings, prompt_seed="x")):
        with serving(first_s=0.0, each_s=0.0) as server:
            measured = run_load({OURS: Target(server.url)}, one, quiet, quiet)
            bodies = [(body["model"], body["max_tokens"], body["prompt"]) for body in sent(server)]
        runs.append((sorted(bodies), load_result(measured, ServiceLevel(), 1)["prompt_seed"]))
    prompts = [{prompt for *_, prompt in bodies} for bodies, _ in runs]
    assert not prompts[0] & prompts[1]
    shapes = [sorted((model, most, len(prompt)) for model, most, prompt in bodies) for bodies, _ in runs]
    assert shapes[0] == shapes[1] == shapes[2]
    assert runs[2] == runs[3]
    assert runs[0][1] != runs[1][1]
    again = replace(settings, prompt_seed=runs[0][1])
    with serving(first_s=0.0, each_s=0.0) as server:
        run_load({OURS: Target(server.url)}, again, quiet, quiet)
        assert {body["prompt"] for body in sent(server)} == prompts[0]


def test_rounds_alternate_between_two_servers_with_the_same_requests(serving):
    order = []
    with serving(first_s=0.0) as fast, serving(first_s=0.8) as slow:
        targets = {OURS: Target(fast.url), THEIRS: Target(slow.url)}
        settings = LoadSettings(Lengths("fixed", 8), FOUR, rate=60.0, requests=10, warm_up=2, rounds=3)
        measured = run_load(targets, settings, lambda label, *_: order.append(label.split(":")[0]), quiet)
        bodies = [sent(fast), sent(slow)]
    assert list(dict.fromkeys(order)) == [
        *("url, round 1", "against, round 1", "against, round 2", "url, round 2", "url, round 3", "against, round 3")
    ]
    assert len(bodies[0]) == 36
    letters = [[body.pop("prompt") for body in found] for found in bodies]
    assert sorted(map(json.dumps, bodies[0])) == sorted(map(json.dumps, bodies[1]))
    assert {len(prompt) for prompt in letters[0] + letters[1]} == {15}
    assert len(set(letters[0] + letters[1])) == 72  # no prompt is in a cache, should both be one server
    result = load_result(measured, ServiceLevel(), 1)
    assert measured.models == ("math", "code", "tool")
    assert len(result["ratios_by_round"]) == 3
    assert all(one["ttft_ms_p50"] < 0.8 for one in result["ratios_by_round"])
    assert result["url"]["requests"] == 30
    joined = measured.all_records(OURS)
    assert [r.arrival for r in joined] == sorted(r.arrival for r in joined)
    assert len(joined) == 36


def test_command(serving, cli, tmp_path):
    with serving() as server:
        load = ("--rate", "50", "--requests", "20", "--prompt", "uniform:4-9", "--output", "uniform:2-6")
        answer = cli("bench", "serve", server.url, *load, "--slo-ttft", "5000", "--decode-workers", "2", "-o", tmp_path)
    assert answer.code == 0, answer.err
    assert "20 of 20 requests complete" in answer.out
    result = json.loads((tmp_path / "load.json").read_text())
    assert result["url"]["goodput"] == 1.0
    assert result["models"] == ["math", "code", "tool"]
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "requests.jsonl").read_text().splitlines()) == 28
    trace = read_trace(tmp_path / "requests.jsonl")
    assert len(trace) == 20
    assert all(2 <= request.output_tokens <= 6 and 4 <= request.prompt_tokens <= 9 for request in trace)


def test_command_as_json_with_a_key_and_a_second_server(serving, cli, tmp_path):
    (tmp_path / "key").write_text("secret\n")
    with serving() as server:
        load = ("--concurrency", "4", "--requests", "6", "--warm-up", "0", "--rounds", "2", "--models", "code,math")
        more = ("--against", server.url, "--api-key-file", tmp_path / "key", "--extra-body", '{"top_k": 1}', "--json")
        answer = cli("bench", "serve", server.url, *load, *more)
        _, headers, body = server.seen[-1]
    assert answer.code == 0, answer.err
    assert len(json.loads(answer.out)["ratios_by_round"]) == 2
    assert "secret" not in answer.out + answer.err
    assert headers["authorization"] == "bearer secret"
    assert body["top_k"] == 1


def test_a_load_from_a_file_is_named_after_it_and_leaves_no_records_of_an_earlier_run(serving, cli, tmp_path):
    rows = [{"prompt": "a b", "model": "code", "max_tokens": 2}, {"prompt": "c"}]
    prompts, out = write_jsonl(tmp_path / "mine.jsonl", rows), tmp_path / "out"
    with serving(first_s=0.0, each_s=0.0) as server:
        load = ("--concurrency", 2, "--requests", 3, "--output", "fixed:2", "--rounds", 1, "-o", out)
        first = cli("bench", "serve", server.url, *load, "--against", server.url)
        assert first.code == 0, first.err
        assert "prompts fixed:128, outputs fixed:2" in first.out
        assert (out / "requests-against.jsonl").exists()
        second = cli("bench", "serve", server.url, *load, "--prompts", prompts)
    assert second.code == 0, second.err
    assert f"prompts of {prompts} with their model and max_tokens, outputs fixed:2" in second.out
    assert sorted(path.name for path in out.iterdir()) == ["load.json", "load.png", "requests.jsonl"]


def test_a_key_that_no_header_can_hold_is_not_shown():
    with pytest.raises(QsunError, match="cannot be sent") as error:
        Target("http://127.0.0.1:9", api_key="gehe\u00efm")
    assert "gehe" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ((), "either --rate"),
        (("--rate", "1", "--concurrency", "1"), "either --rate"),
        (("--rate", "inf"), "--concurrency to saturate"),
        (("--rate", "1", "--endpoint", "embeddings"), "endpoint 'embeddings'"),
        (("--rate", "1", "--requests", "0"), "requests 0"),
        (("--rate", "1", "--skew", "-1"), "skew -1"),
        (("--rate", "1", "--extra-body", "[]"), "not a JSON object"),
        (("--rate", "1", "--extra-body", '{"a": NaN}'), "extra-body: NaN and Infinity are not JSON"),
        (("--rate", "1", "--extra-body", '{"a": "\\ud83d"}'), "half of a surrogate pair"),
        (("--rate", "1", "--extra-body", '{"a": 1' + "0" * 5000 + "}"), "too many digits"),
        (("--rate", "1", "--extra-body", '{"a":' + "[" * 100_000), "nests too deep"),
        (("--rate", "1", "--models", "\udcff"), "models: '\\udcff' is half of a surrogate pair"),
        (("--rate", "1", "--prompt-seed", "\udcff"), "prompt-seed: '\\udcff' is half of a surrogate pair"),
        (("--rate", "1", "--deadline", "0"), "deadline 0"),
        (("--rate", "1", "--slo-tpot", "0"), "slo-tpot 0"),
        (("--rate", "1", "--decode-workers", "0"), "decode-workers 0"),
    ],
)
def test_command_names_what_is_wrong(cli, options, problem):
    answer = cli("bench", "serve", "http://127.0.0.1:9", *options)
    assert answer.code == 2
    assert problem in " ".join(answer.err.split())


def test_an_invalid_address():
    for url in ("localhost", "http://[::1", "http://127.0.0.1:port", "http://127.0.0.1/\udcff"):
        with pytest.raises(
            QsunError, match=r"^url '.*' is not an http address; use one such as http://127.0.0.1:8000$"
        ):
            Target(url)
