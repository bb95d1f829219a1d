"""Answers of /v1/responses: a list of output items, and typed events while they grow."""

import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from qsun.engine.requests import Update
from qsun.serve.api.answers.answer import Answer, Choice
from qsun.serve.api.tools.parser import Call
from qsun.serve.http.errors import HttpError
from qsun.serve.http.wire import encode_event


class ResponseAnswer(Answer):
    """The answer of /v1/responses, of a single choice. settings: what it repeats of its request.

    Its output is in the order in which the model began each item. All that it says is one message.
    """

    prefix = "resp"

    def __init__(self, *arguments: Any, settings: Mapping[str, Any]):
        super().__init__(*arguments)
        (self._only,) = self.choices
        self._settings, self._number = settings, 0
        self._message_id = f"msg_{uuid.uuid4().hex}"

    def whole(self) -> dict[str, Any]:
        items = [_call_item(call) for call in self._only.calls]
        if self._only.text or not items:
            items.insert(self._only.calls_before_text, self._message(self._only.text))
        return self._body(items)

    def _body(self, output: list[dict[str, Any]]) -> dict[str, Any]:
        finish = self._only.finish
        status = "incomplete" if finish == "length" else "completed" if finish else "in_progress"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "model": self.model,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": output,
            "usage": self._usage() if finish else None,
            "previous_response_id": None,
            **self._settings,
        }

    def _usage(self) -> dict[str, Any]:
        usage = self.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }

    def _message(self, text: str | None) -> dict[str, Any]:
        """Return the message item; None: one that begins."""
        item = {"id": self._message_id, "type": "message", "role": "assistant"}
        if text is None:
            return item | {"status": "in_progress", "content": []}
        return item | {"status": "completed", "content": [_part(text)]}

    # --- streams ------------------------------------------------------------------------------------------------------

    def opening(self) -> Iterator[bytes]:
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self._body([]))

    def events(self, choice: Choice, update: Update) -> Iterator[bytes]:
        began, known = bool(choice.text), len(choice.calls)
        content, _ = choice.take(update)
        ahead = max(known, choice.calls_before_text if choice.text else len(choice.calls))
        for place, call in enumerate(choice.calls[known:ahead], known):
            yield from self._whole_call(place, call)
        if not began and (content or (update.finish and not choice.calls)):
            yield from self._begin_message()
        if content:
            yield self._event("response.output_text.delta", **self._place, delta=content, logprobs=[])
        if update.finish and (choice.text or not choice.calls):
            yield from self._end_message(choice.text)
        for place, call in enumerate(choice.calls[ahead:], ahead + 1):
            yield from self._whole_call(place, call)

    def _begin_message(self) -> Iterator[bytes]:
        at = {"output_index": self._only.calls_before_text}
        yield self._event("response.output_item.added", **at, item=self._message(None))
        yield self._event("response.content_part.added", **self._place, part=_part(""))

    def _end_message(self, text: str) -> Iterator[bytes]:
        at = {"output_index": self._only.calls_before_text}
        yield self._event("response.output_text.done", **self._place, text=text, logprobs=[])
        yield self._event("response.content_part.done", **self._place, part=_part(text))
        yield self._event("response.output_item.done", **at, item=self._message(text))

    def _whole_call(self, place: int, call: Call) -> Iterator[bytes]:
        item = _call_item(call)
        at = {"item_id": item["id"], "output_index": place}
        begun = item | {"arguments": "", "status": "in_progress"}
        yield self._event("response.output_item.added", output_index=place, item=begun)
        yield self._event("response.function_call_arguments.delta", **at, delta=call.arguments)
        yield self._event("response.function_call_arguments.done", **at, name=call.name, arguments=call.arguments)
        yield self._event("response.output_item.done", output_index=place, item=item)

    def closing(self) -> Iterator[bytes]:
        body = self.whole()
        yield self._event(f"response.{body['status']}", response=body)

    def failure(self, error: HttpError) -> bytes:
        return self._event("error", **{key: error.body()["error"][key] for key in ("code", "message", "param")})

    @property
    def _place(self) -> dict[str, Any]:
        place = self._only.calls_before_text
        return {"item_id": self._message_id, "output_index": place, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return encode_event({"type": kind, "sequence_number": self._number - 1, **fields}, kind)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call_item(call: Call) -> dict[str, Any]:
    return {
        "id": f"fc_{call.id.removeprefix('call_')}",
        "type": "function_call",
        "status": "completed",
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
    }
