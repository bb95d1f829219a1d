"""Answers of /v1/completions."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from qsun.engine.requests import TokenLogprob, Update
from qsun.serve.api.answers.answer import Choice, ChoicesAnswer


class CompletionAnswer(ChoicesAnswer):
    """Attributes:
    echo: the prompt is part of the text. prompt_logprobs: and its tokens are among the log-probabilities.
    prompt_texts: of each prompt, as it was given.
    """

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"
    echo = prompt_logprobs = False
    prompt_texts: Sequence[str] = ()

    def choice(self, choice: Choice) -> dict[str, Any]:
        text, logprobs = choice.text, self._answer_logprobs(choice)
        if self.echo:
            text = self._prompt_text(choice) + text
        if self.prompt_logprobs:
            prompt = self._prompt_logprobs(choice, choice.prompt_logprobs)
            logprobs = prompt if logprobs is None else {key: prompt[key] + logprobs[key] for key in prompt}
        return self._line(choice, text, logprobs, choice.reason) | self.token_ids(choice.tokens)

    def opening(self) -> Iterator[bytes]:
        """Yield nothing: log-probabilities of a prompt, which is the first event of an echo, come with its answer."""
        return iter(())

    def events(self, choice: Choice, update: Update) -> Iterator[bytes]:
        start = len(choice.tokens)
        if self.echo and not start:
            prompt = self._prompt_logprobs(choice, update.prompt_logprobs) if self.prompt_logprobs else None
            yield self.chunk([self._line(choice, self._prompt_text(choice), prompt, None)])
        text, _ = choice.take(update)
        logprobs = self._answer_logprobs(choice, start)
        if text or update.finish or logprobs or self.style.token_ids:
            tokens = self.token_ids(choice.tokens[start:])
            yield self.chunk([self._line(choice, text, logprobs, choice.reason) | tokens])

    def _line(self, choice: Choice, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _prompt_text(self, choice: Choice) -> str:
        return self.prompt_texts[choice.index // self._n]

    def _answer_logprobs(self, choice: Choice, start: int = 0) -> dict[str, Any] | None:
        """Return those of the answer's tokens from `start` on; None: none were asked for, or there are no tokens."""
        if not choice.logprobs[start:]:
            return None
        before = len(self._prompt_text(choice)) if self.echo else 0
        return self._logprobs(choice.logprobs[start:], [before + place for place in choice.offsets[start:]])

    def _prompt_logprobs(self, choice: Choice, found: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Return those of the prompt's tokens; nothing predicts the first one."""
        texts, length = [self.style.spelling.text(token) for token in choice.prompt], len(self._prompt_text(choice))
        places = [min(place, length) for place in accumulate(map(len, texts[:-1]), initial=0)]
        first = {"tokens": texts[:1], "token_logprobs": [None], "top_logprobs": [None], "text_offset": [0]}
        others = self._logprobs(found, places[1:])
        return {key: values + others[key] for key, values in first.items()}

    def _logprobs(self, found: Sequence[TokenLogprob], offsets: Sequence[int]) -> dict[str, Any]:
        spell = self.style.spelling.text
        return {
            "tokens": [spell(one.token) for one in found],
            "token_logprobs": [one.logprob for one in found],
            "top_logprobs": [{spell(token): value for token, value in one.top} for one in found],
            "text_offset": list(offsets),
        }
