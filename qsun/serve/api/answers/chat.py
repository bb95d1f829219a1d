"""Answers of /v1/chat/completions."""

from collections.abc import Iterator, Sequence
from typing import Any

from qsun.engine.requests import TokenLogprob, Update
from qsun.serve.api.answers.answer import Choice, ChoicesAnswer


class ChatAnswer(ChoicesAnswer):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text}
        if choice.calls:
            message |= {"content": choice.text or None, "tool_calls": [call.as_json() for call in choice.calls]}
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": choice.reason,
        } | self.token_ids(choice.tokens)

    def opening(self) -> Iterator[bytes]:
        """Yield the role of each choice."""
        for choice in self.choices:
            yield self._chunk(choice, {"role": "assistant", "content": ""})

    def events(self, choice: Choice, update: Update) -> Iterator[bytes]:
        first = len(choice.calls)
        content, calls = choice.take(update)
        delta: dict[str, Any] = {"content": content} if content else {}
        if calls:
            delta["tool_calls"] = [{"index": first + i} | call.as_json() for i, call in enumerate(calls)]
        if delta or update.logprobs or self.style.token_ids:
            yield self._chunk(choice, delta, self._logprobs(update.logprobs), self.token_ids(update.tokens))
        if update.finish:
            yield self._chunk(choice, {}, reason=choice.reason)

    def _chunk(
        self,
        choice: Choice,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        more: dict[str, Any] | None = None,
        reason: str | None = None,
    ) -> bytes:
        line = {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self.chunk([line | (more or {})])

    def _logprobs(self, found: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not found:
            return None
        return {
            "content": [
                self._entry(one.token, one.logprob)
                | {"top_logprobs": [self._entry(token, value) for token, value in one.top]}
                for one in found
            ]
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        spelling = self.style.spelling
        return {"token": spelling.text(token), "logprob": logprob, "bytes": list(spelling.bytes(token))}
