"""Requests to a cluster of real vLLMs through OpenAI's client, and the tokens of `qsun.generate` for them."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openai

import qsun
from tests.vllm.cluster_files import MODELS, VOCAB

LENGTHS = (1, 2, 17, 127, 128, 129, 200, 257)  # vLLM's blocks for a CPU hold 128 tokens
NEW_TOKENS = 16
EXACT = {"return_token_ids": True, "ignore_eos": True}
DEADLINE_SECONDS = 600


@dataclass(frozen=True)
class Request:
    """One request to a model; stream: taken as it comes."""

    model: str
    prompt: tuple[int, ...]
    stream: bool
    max_tokens: int = NEW_TOKENS


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=DEADLINE_SECONDS, max_retries=0)


def prompt(length: int, seed: int) -> tuple[int, ...]:
    return (1, *np.random.default_rng(seed).integers(3, VOCAB, length - 1).tolist())


def ask(url: str, request: Request) -> list[int]:
    """Tokens that the OpenAI client gets. Raises openai.APIError, with `.tokens` so far where a stream broke off."""
    with client_of(url) as client:
        answer = client.completions.create(
            model=request.model,
            prompt=list(request.prompt),
            max_tokens=request.max_tokens,
            temperature=0,
            stream=request.stream,
            extra_body=EXACT,
        )
        if not request.stream:
            return answer.choices[0].token_ids
        tokens: list[int] = []
        try:
            for chunk in answer:
                for choice in chunk.choices:
                    tokens += choice.token_ids or []
        except openai.APIError as error:
            error.tokens = tokens
            raise
        return tokens


def ask_all(url: str, requests: list[Request]) -> list[list[int] | openai.APIError]:
    """All at once; an error in place of the tokens of a request that failed."""

    def one(request: Request) -> list[int] | openai.APIError:
        try:
            return ask(url, request)
        except openai.APIError as error:
            return error

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(one, requests))


def reference(modules: dict[str, Path]) -> Callable[[list[Request]], list[list[int]]]:
    """A function that gives the tokens of `qsun.generate` for requests to MODELS."""
    decode = qsun.load_decode(modules["decode"], device="cpu", dtype="float32")
    return answers_of(
        decode, {name: qsun.load_prefill(modules[name], decode=decode, dtype="float32") for name in MODELS}
    )


def answers_of(
    decode: qsun.DecodeModule, prefills: dict[str, qsun.PrefillModule]
) -> Callable[[list[Request]], list[list[int]]]:
    """The same for requests to prefill modules by name."""

    def answers(requests: list[Request]) -> list[list[int]]:
        rows = [list(request.prompt) for request in requests]
        readers = [prefills[request.model] for request in requests]
        longest = max(request.max_tokens for request in requests)
        tokens = qsun.generate(readers, decode, rows, max_new_tokens=longest, eos=())
        return [row[: request.max_tokens] for row, request in zip(tokens, requests, strict=True)]

    return answers
