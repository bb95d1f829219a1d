"""Answers of /v1/completions."""

from collections.abc import Iterator, Sequence
from typing import Any

from qsun.engine.requests import TokenLogprob, Update
from qsun.serve.api.answers.answer import Choice, ChoicesAnswer


class CompletionAnswer(ChoicesAnswer):
    """Attributes:
    echo: the prompt is part of the text. no_tokens: the answer itself is not (max_tokens 0).
    prompt_texts: of each prompt, as it was given.
    """

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"
    echo = no_tokens = False
    prompt_texts: Sequence[str] = ()

    def choice(self, choice: Choice) -> dict[str, Any]:
        logprobs, offsets, tokens = choice.logprobs, choice.offsets, choice.tokens
        text = "" if self.no_tokens else choice.text
        if self.no_tokens:
            logprobs, offsets, tokens = [], [], []
        found = self._logprobs(logprobs, offsets)
        if self.echo:
            before = self._prompt_text(choice)
            if choice.prompt_logprobs:
                found = self._echoed(choice, found, len(before))
            text = before + text
        return {
            "index": choice.index,
            "text": text,
            "logprobs": found,
            "finish_reason": "length" if self.no_tokens else choice.reason,
        } | self.token_ids(tokens)

    def opening(self) -> Iterator[bytes]:
        if self.echo:
            for choice in self.choices:
                yield self.chunk([self._line(choice, self._prompt_text(choice), None, None)])

    def events(self, choice: Choice, update: Update) -> Iterator[bytes]:
        text, _ = choice.take(update)
        if text or update.finish or update.logprobs or self.style.token_ids:
            offsets = choice.offsets[len(choice.offsets) - len(update.tokens) :]
            logprobs = self._logprobs(update.logprobs, offsets)
            yield self.chunk([self._line(choice, text, logprobs, choice.reason) | self.token_ids(update.tokens)])

    def _line(self, choice: Choice, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _prompt_text(self, choice: Choice) -> str:
        return self.prompt_texts[choice.index // self._n]

    def _logprobs(self, found: Sequence[TokenLogprob], offsets: Sequence[int]) -> dict[str, Any] | None:
        if not found:
            return None
        spell = self.style.spelling.text
        return {
            "tokens": [spell(one.token) for one in found],
            "token_logprobs": [one.logprob for one in found],
            "top_logprobs": [{spell(token): value for token, value in one.top} for one in found],
            "text_offset": list(offsets),
        }

    def _echoed(self, choice: Choice, answer: dict[str, Any] | None, length: int) -> dict[str, Any]:
        """Put the prompt's tokens before those of the answer; nothing predicts the first one."""
        spell = self.style.spelling.text
        texts = [spell(token) for token in choice.prompt]
        places = [min(sum(map(len, texts[:i])), length) for i in range(len(texts))]
        prompt = self._logprobs(choice.prompt_logprobs, places[1:])
        joined = {
            "tokens": texts[:1],
            "token_logprobs": [None],
            "top_logprobs": [None],
            "text_offset": [0],
        }
        shifted = answer and answer | {"text_offset": [length + place for place in answer["text_offset"]]}
        for part in (prompt, shifted):
            joined = {key: values + part[key] for key, values in joined.items()} if part else joined
        return joined
