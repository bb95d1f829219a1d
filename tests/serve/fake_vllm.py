"""vLLM workers without a model: the exact transfer protocol, as unforgiving as the real one.

A prefill worker puts a prompt's KV cache into `network` and names it once. A decode worker takes it out of there, and
then its text is a function of the module that wrote the cache and of the prompt. As with vLLM, nothing is an error:
parameters that are missing, used before or invented give status 200 and other text.
"""

import asyncio
import json
import socket
import uuid
import zlib
from contextlib import asynccontextmanager, contextmanager

import uvicorn

GARBAGE = "garbage "
OWN_WEIGHTS = "decode module alone"
NOT_NULL = ("ignore_eos", "include_reasoning", "length_penalty", "min_tokens", "skip_special_tokens")  # vLLM: 400
CONSTRAINTS = ("response_format", "structured_outputs", "guided_json", "min_tokens")  # of an answer, not of a prompt


def word(module, prompt, place):
    """The token that a module's KV cache makes the decode module write."""
    return f"{zlib.crc32(repr((module, prompt, place)).encode()) % 9973} "


def expected_text(module, prompt, tokens):
    return "".join(word(module, prompt, place) for place in range(tokens))


class Server(uvicorn.Server):
    """uvicorn in a loop that is not its own."""

    @contextmanager
    def capture_signals(self):
        yield


@asynccontextmanager
async def listening(app, port=0, lifespan="off"):
    """Serve an ASGI application on the running loop; gives the server, whose `url` says where."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    server = Server(uvicorn.Config(app, log_config=None, lifespan=lifespan, timeout_graceful_shutdown=1, ws="none"))
    server.port = listener.getsockname()[1]
    server.url = f"http://127.0.0.1:{server.port}"
    task = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.001)
    try:
        yield server
    finally:
        server.should_exit = True
        try:
            await task
        finally:
            listener.close()


class FakeWorker:
    """One worker; its attributes are the faults that a test wants.

    Attributes:
        module: the weights. served_name: under which it serves them. adapters: on these weights, by their names.
        statuses: of the next answers, instead of 200.
        without_params: how many of the next prefills answer without transfer parameters; bad_params: with these.
        max_model_len, max_new_tokens: of prompt and answer, and of an answer whose request leaves it open.
        first_seconds, token_seconds, check_seconds: how slow it is; the last one at /health and /v1/models each.
        gate: an event that each token waits for.
        cut_after, abort_after, error_after, no_done: tokens after which a stream breaks, in four ways.
        handshakes_to_fail: of each pair's first requests.
        extra_prompt_tokens: by which it miscounts.
        prefix_caching: a decode worker that caches by cache_salt and prompt.
        unreachable: engine ids of the prefill workers whose KV cache a decode worker cannot load.
        hides_tools: it leaves tools out of the prompt where the tool choice is none.
        seen: bodies that it got. started, finished, cancelled: counts of them.
    """

    def __init__(self, role, module, served_name, network):
        self.role, self.module, self.served_name, self.network = role, module, served_name, network
        self.adapters = {}
        self.statuses, self.without_params, self.bad_params = [], 0, None
        self.first_seconds = self.token_seconds = self.check_seconds = 0.0
        self.gate = None
        self.cut_after = self.abort_after = self.error_after = None
        self.no_done = False
        self.handshakes_to_fail = 0
        self.prefix_caching, self.prefix_cache = False, {}
        self.healthy, self.extra_prompt_tokens = True, 0
        self.unreachable, self.hides_tools = set(), False
        self.max_model_len, self.max_new_tokens = 4096, 64
        self.handshakes = {}
        self.seen, self.started, self.finished, self.cancelled = [], 0, 0, 0
        self.engine_id = uuid.uuid4().hex
        self._port, self._running = 0, None

    @property
    def url(self):
        return f"http://127.0.0.1:{self._port}"

    async def start(self):
        self._running = listening(self, self._port)
        self._server = await self._running.__aenter__()
        self._port = self._server.port

    async def kill(self):
        """Act as after SIGKILL: every connection breaks, and memory is lost."""
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()
        for server in self._server.servers:
            server.close()
        self._server.force_exit = True
        await self.stop()
        for key in [key for key in self.network if key[0] == self.engine_id]:
            del self.network[key]

    async def restart(self, module=None, served_name=None):
        self.module, self.served_name = module or self.module, served_name or self.served_name
        self.engine_id, self.handshakes, self.prefix_cache = uuid.uuid4().hex, {}, {}
        await self.start()

    async def stop(self):
        if self._running is not None:
            running, self._running = self._running, None
            await running.__aexit__(None, None, None)

    async def __call__(self, scope, receive, send):
        if scope["path"] in ("/health", "/v1/models"):
            await asyncio.sleep(self.check_seconds)
        if scope["path"] == "/health":
            await answer(send, {}, 200 if self.healthy else 503)
        elif scope["path"] == "/v1/models":
            card = {"object": "model", "max_model_len": self.max_model_len}
            cards = [card | {"id": name} for name in (self.served_name, *self.adapters)]
            await answer(send, {"object": "list", "data": cards})
        else:
            body = await read_body(receive)
            work = asyncio.ensure_future(self._generate(scope, json.loads(body), send))
            gone = asyncio.ensure_future(disconnect(receive))
            await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
            self.cancelled += not work.done()
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _generate(self, scope, body, send):
        self.seen.append(body | {"headers": dict(scope["headers"])})
        self.started += 1
        if self.statuses and (status := self.statuses.pop(0)) != 200:
            await answer(send, {"error": {"message": f"told to answer {status}"}}, status)
            return
        if body["model"] not in (self.served_name, *self.adapters):
            await answer(send, {"error": {"message": f"The model `{body['model']}` does not exist."}}, 404)
            return
        null = [name for name in NOT_NULL if name in body and body[name] is None]
        if null:
            await answer(send, {"error": {"message": f"{null[0]}: input should be valid"}}, 400)
            return
        await asyncio.sleep(self.first_seconds)
        prompt = prompt_of(body, self.hides_tools)
        if self.role == "prefill":
            await self._prefill(scope, body, prompt, send)
        else:
            await self._decode(scope, body, prompt, send)
        self.finished += 1

    async def _prefill(self, scope, body, prompt, send):
        assert body["max_tokens"] == 1 and body["stream"] is False
        assert not any(name in body for name in CONSTRAINTS) and body.get("tool_choice", "none") == "none"
        wanted = body["kv_transfer_params"]
        assert wanted["do_remote_decode"] is True and wanted["do_remote_prefill"] is False
        request_id = f"{dict(scope['headers'])[b'x-request-id'].decode()}-{uuid.uuid4().hex}"
        self.network[self.engine_id, request_id] = (self.adapters.get(body["model"], self.module), prompt)
        params = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": self.engine_id,
            "remote_request_id": request_id,
            "remote_block_ids": [[1, 2, 3]],
            "remote_host": "127.0.0.1",
            "remote_port": 1,
        }
        if self.without_params:
            self.without_params -= 1
            params = self.bad_params
        await answer(send, self._whole(scope, body, prompt, ["x"], "length") | {"kv_transfer_params": params})

    def _source(self, body, prompt):
        """Return the model whose KV cache this request decodes over; None for another request's blocks."""
        params = body.get("kv_transfer_params")
        if self.role == "aggregated":  # it reads the prompt itself, with the adapter
            return self.adapters.get(body["model"], OWN_WEIGHTS) if params is None else None
        found = OWN_WEIGHTS
        if body.get("prompt_logprobs") is not None:  # false is 0 to pydantic: vLLM computes the prompt itself
            return OWN_WEIGHTS
        if params is not None:
            kv_cache = self.network.pop((params["remote_engine_id"], params["remote_request_id"]), None)
            found = kv_cache[0] if kv_cache is not None and kv_cache[1] == prompt else None
        if self.prefix_caching:
            found = self.prefix_cache.setdefault((body.get("cache_salt"), prompt), found)
        return OWN_WEIGHTS if token_count(prompt) == 1 else found

    async def _decode(self, scope, body, prompt, send):
        params = body.get("kv_transfer_params")
        if params is not None:
            pair = params["remote_engine_id"]
            self.handshakes[pair] = self.handshakes.get(pair, 0) + 1
            if self.handshakes[pair] <= self.handshakes_to_fail:
                await answer(send, {"error": {"message": "KV load failed: handshake"}}, 500)
                return
            if pair in self.unreachable:
                await answer(send, {"error": {"message": "KV load failed: no route"}}, 500)
                return
        source = self._source(body, prompt)
        count = body.get("max_completion_tokens") or body.get("max_tokens")
        if count is None:  # vLLM fills its context, up to the server's max_new_tokens
            count = min(self.max_new_tokens, self.max_model_len - token_count(prompt))
        words = [GARBAGE if source is None else word(source, prompt, place) for place in range(count)]
        if body.get("stream"):
            await self._stream(scope, body, prompt, words, send)
            return
        for place in range(count):
            await self._token(place)
            if place == self.abort_after:
                await answer(send, self._whole(scope, body, prompt, words[:place], "abort"))
                return
        await answer(send, self._whole(scope, body, prompt, words, "length"))

    async def _token(self, place):
        if self.gate is not None:
            await self.gate.wait()
        if self.token_seconds:
            await asyncio.sleep(self.token_seconds)
        if place == self.cut_after:
            for connection in list(self._server.server_state.connections):
                connection.transport.abort()
            await asyncio.sleep(10)

    async def _stream(self, scope, body, prompt, words, send):
        chat = "chat" in scope["path"]
        head = {"id": "x", "object": "chunk", "model": self.served_name}
        if body.get("stream_options", {}).get("continuous_usage_stats"):
            head["usage"] = usage(prompt, 1)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for place, text in enumerate(words):
            await self._token(place)
            if chat and place == 0:  # vLLM sends it before it looks at how the request fares
                opening = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                await event(send, head | {"choices": [opening]})
            if place == self.error_after:
                await event(send, {"error": {"message": "KV load failed", "code": 500}})
                break
            reason = "length" if place == len(words) - 1 else None
            reason = "abort" if place == self.abort_after else reason
            part = {"delta": {"content": text}} if chat else {"text": text}
            await event(send, head | {"choices": [{"index": 0, "finish_reason": reason} | part]})
            if reason == "abort":
                break
        if body.get("stream_options", {}).get("include_usage"):
            await event(send, head | {"choices": [], "usage": usage(prompt, len(words))})
        if not self.no_done:
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    def _whole(self, scope, body, prompt, words, reason):
        text = "".join(words)
        part = {"message": {"role": "assistant", "content": text}} if "chat" in scope["path"] else {"text": text}
        choice = {"index": 0, "finish_reason": reason} | part
        kind = {"id": "x", "object": "chat.completion" if "chat" in scope["path"] else "text_completion", "created": 1}
        counts = usage(prompt, len(words))
        counts["prompt_tokens"] += self.extra_prompt_tokens
        return kind | {"model": body["model"], "choices": [choice], "usage": counts}


def prompt_of(body, hides_tools=False):
    """What a worker renders, as text or token ids."""
    if "messages" in body:
        hidden = hides_tools and body.get("tool_choice") == "none"
        tools = [] if hidden else body.get("tools", [])
        return json.dumps([*body["messages"], *tools])
    return tuple(body["prompt"]) if isinstance(body["prompt"], list) else body["prompt"]


def token_count(prompt):
    return len(prompt) if isinstance(prompt, tuple) else len(prompt.split())


def usage(prompt, tokens):
    count = token_count(prompt)
    return {"prompt_tokens": count, "completion_tokens": tokens, "total_tokens": count + tokens}


async def answer(send, body, status=200):
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})


async def event(send, body):
    await send(
        {"type": "http.response.body", "body": b"data: " + json.dumps(body).encode() + b"\n\n", "more_body": True}
    )


async def read_body(receive):
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


async def disconnect(receive):
    while (await receive())["type"] != "http.disconnect":
        pass
