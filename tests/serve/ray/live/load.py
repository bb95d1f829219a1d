"""Requests whose right answers are known, so many in flight, and how each of them ended."""

import asyncio
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

MOST_IN_FLIGHT = 256
DEADLINE_SECONDS = 900.0


@dataclass(frozen=True)
class Question:
    """A request to /v1/completions.

    Attributes:
        wanted: its right answers, each a text or a list of token ids; several while a module is replaced.
    """

    body: Mapping[str, Any]
    wanted: tuple[Any, ...]

    def part(self, choice: Mapping[str, Any]) -> Any:
        """Return what a choice of an answer, or of an event, has of the answer."""
        return choice["text"] if isinstance(self.wanted[0], str) else choice.get("token_ids") or []


async def ask(client: httpx.AsyncClient, question: Question) -> str:
    """Return how a request ended: "right", "wrong", "cut off" (an error event after right tokens), or its error."""
    try:
        answer = await client.post("/v1/completions", json=dict(question.body))
    except httpx.HTTPError as error:
        return type(error).__name__
    if answer.status_code != 200:
        return f"status {answer.status_code}"
    if question.body["stream"]:
        found, end = streamed(answer.text, question.part, type(question.wanted[0])())
    else:
        found, end = question.part(answer.json()["choices"][0]), "complete"
    if end == "error" and any(wanted[: len(found)] == found for wanted in question.wanted):
        return "cut off"
    if end == "complete" and found in question.wanted:
        return "right"
    short = {name: str(question.body[name])[:60] for name in ("model", "prompt")}
    print(f"WRONG, {end}: {short}: {found[:20]} and not {question.wanted[0][:20]}", file=sys.stderr, flush=True)
    return "wrong" if end == "complete" else "broken"


def streamed(body: str, part: Callable[[Mapping[str, Any]], Any], empty: Any) -> tuple[Any, str]:
    """Return the answer that the events of a stream have, and its end: "complete", "error", or "" without either."""
    events = [line[6:] for line in body.splitlines() if line.startswith("data: ")]
    parsed = [json.loads(event) for event in events if event != "[DONE]"]
    found = empty
    for choice in itertools.chain.from_iterable(event.get("choices", []) for event in parsed):
        found = found + part(choice)
    if events[-1:] == ["[DONE]"]:
        return found, "complete"
    return found, "error" if parsed and "error" in parsed[-1] else ""


def client_of(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=MOST_IN_FLIGHT)
    return httpx.AsyncClient(base_url=url, trust_env=False, timeout=DEADLINE_SECONDS, limits=limits)


async def many(url: str, questions: Iterable[Question], at_once: int = 32) -> Counter[str]:
    """Send requests, so many at a time. Return how many ended in which way."""
    turns = asyncio.Semaphore(at_once)

    async def in_turn(client: httpx.AsyncClient, question: Question) -> str:
        async with turns:
            return await ask(client, question)

    async with client_of(url) as client:
        return Counter(await asyncio.gather(*(in_turn(client, question) for question in questions)))


class Load:
    """Requests one after the other, so many in flight, until it is stopped.

    Args:
        question: gives request `number`.
    Attributes:
        at_once: in flight; may be changed. sent: so far. ended: how many in which way.
    """

    def __init__(self, url: str, question: Callable[[int], Question], at_once: int):
        self._url, self._question, self.at_once = url, question, at_once
        self.sent, self.ended, self._stopped = 0, Counter[str](), False

    def start(self) -> None:
        self._running = asyncio.ensure_future(self._run())

    async def stop(self) -> None:
        """Send no more, and return once all have ended."""
        self._stopped = True
        await self._running

    async def _run(self) -> None:
        running: set[asyncio.Task[str]] = set()
        async with client_of(self._url) as client:
            while running or not self._stopped:
                while not self._stopped and len(running) < self.at_once:
                    running.add(asyncio.ensure_future(ask(client, self._question(self.sent))))
                    self.sent += 1
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                self.ended.update(task.result() for task in done)
