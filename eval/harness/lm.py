"""`qsun`, a model for lm-eval: a prefill module reads the context, the decode module scores or writes the rest.

A request is a context and a continuation. The prefill module reads the context up to its last token; the decode module
reads that token and scores (loglikelihood) or writes (generate_until) the continuation: the seam as it is tuned and
served. The decode module therefore scores the choices of a multiple-choice question behind the question's KV, which is
computed once for all of them.

loglikelihood_rolling has no prompt: the decode module reads all of each window, including the tokens before those that
are scored. The prefill module is not used, so perplexities of documents are the decode module's own.

Tokenization, few-shot prompts, truncation, stop strings, caching and the distribution over processes are those of
lm-eval's `hf` model, the base class.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import find_executable_batch_size
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator, normalize_gen_kwargs
from torch import Tensor
from tqdm import tqdm

from qsun.data.examples import TokenExample
from qsun.engine.generation import generate
from qsun.errors import QsunError
from qsun.eval.harness.chats import harness_chat_text
from qsun.eval.harness.lm_settings import check_settings, device_of, launched_processes, load_pair, sampling_settings
from qsun.runtime.decode_module import DecodeModule
from qsun.runtime.logits import log_probabilities, position_pieces
from qsun.runtime.prefill_module import PrefillModule
from qsun.runtime.seam import SeamBatch, collate, decode_hidden, prefill_batch

log = logging.getLogger(__name__)

CPU_BATCH = 32  # `batch_size=auto` on a CPU: larger ones gain little, and running out of memory is fatal
TokenRequest = tuple[Any, list[int], list[int]]  # lm-eval's cache key, context, continuation


@register_model("qsun")
class QsunLM(HFLM):  # type: ignore[misc]
    """A pair of modules as a model of lm-eval.

    Args:
        decode: decode module: directory, hub id or "demo"; or loaded, if prefill is as well.
        prefill: prefill module or LoRA adapter. Default: decode itself if it is full precision, otherwise the base that
            its qsun.json names.
        device: falls back to the CPU without a GPU, as lm-eval's own models do.
        dtype: of activations and unquantized weights; default or "auto": the stored dtype.
        batch_size: a number, or "auto": the largest that fits a GPU's memory, CPU_BATCH on a CPU.
        max_batch_size: upper bound for "auto".
        settings: of lm-eval's HFLM, those in lm_settings.PASSED_ON.
    Raises:
        QsunError: an unknown setting, a damaged module, or an incompatible pair.
    """

    def __init__(
        self,
        decode: str | DecodeModule = "",
        prefill: str | PrefillModule | None = None,
        device: str | None = "cuda",
        dtype: str | torch.dtype | None = None,
        batch_size: int | str = 1,
        max_batch_size: int = 64,
        **settings: Any,
    ):
        check_settings(decode, batch_size, settings)
        several = launched_processes(device_of(device))
        place = several.device if several else device_of(device)
        self.prefill_module, self.decode_module = load_pair(decode, prefill, place, dtype)
        model = self.decode_module.model
        limit = model.config.max_position_embeddings
        if int(settings.get("max_length") or 0) > limit:
            raise QsunError(f"max_length {settings['max_length']} is over the model's {limit} positions; use {limit}")
        with _without_advice():
            super().__init__(
                pretrained=model,
                tokenizer=str(self.decode_module.directory),
                batch_size=batch_size,
                max_batch_size=max_batch_size,
                **settings,
            )
        self._rolling = False
        self._device = place  # with a loaded model, HFLM assumes a single process
        if several:
            self.accelerator = several
            self._rank, self._world_size = several.process_index, several.num_processes

    def get_model_info(self) -> dict[str, Any]:
        """Describe the model for the results."""
        return {
            "model_num_parameters": sum(p.numel() for p in self.decode_module.model.parameters()),
            "model_dtype": str(self.model.dtype),
            "decode_module": str(self.decode_module.directory),
            "prefill_module": str(self.prefill_module.directory),
        }

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a prompt as serving does; as there, no special tokens are added to what the template writes."""
        self.add_bos_token = False
        return harness_chat_text(self.tokenizer, chat_history, add_generation_prompt, self.chat_template_args)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log probability of each document under the decode module alone."""
        self._rolling = True  # lm-eval passes windows of documents to _loglikelihood_tokens like requests
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self._rolling = False

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return (log probability of the continuation, whether it is the greedy one) of each request."""
        counts = [len(continuation) for _, _, continuation in requests]  # scored, from the end
        if self._rolling:  # a document's last window begins with text that is already scored and not a prompt
            requests = [(key, context[:1], context[1:] + rest) for key, context, rest in requests]
        rows = self._rows(requests)
        order = Collator(rows, sort_fn=_longest_first(rows))
        self.batch_sizes: dict[int, int] = {}
        automatic = self.batch_size == "auto" and override_bs is None
        batches = order.get_batched(
            n=override_bs or (0 if automatic else self.batch_size),
            batch_fn=self._batch_scheduler if automatic and rows else None,
        )
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        for batch in batches:
            hidden = self._read([TokenExample(tuple(context), tuple(rest)) for _, context, rest in batch])
            for (members, _, _), states in zip(batch, hidden, strict=True):
                tokens = torch.tensor([requests[number][2] for number in members], device=self.device)
                found = self._score(states, tokens, [counts[number] for number in members])
                for number, answer in zip(members, found, strict=True):
                    key, answers[number] = requests[number][0], answer
                    if key is not None:  # None: a window of loglikelihood_rolling, which caches whole documents
                        self.cache_hook.add_partial("loglikelihood", key, answers[number])
                    bar.update(1)
        bar.close()
        return answers

    def _rows(self, requests: list[TokenRequest]) -> list[tuple[list[int], list[int], list[int]]]:
        """Return rows of (request numbers, context, continuation), truncated on the left.

        Requests that differ in the last token only share a row. Equal tokens with another seam do not: other modules
        read them.
        """
        rows: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[list[int], list[int], list[int]]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            if not context or not 0 < len(continuation) <= self.max_length:
                raise QsunError(
                    f"request {number} has {len(context)} context and {len(continuation)} continuation tokens; give at "
                    f"least one of each, and at most max_length {self.max_length} in a continuation"
                )
            too_long = len(context) + len(continuation) - (self.max_length + 1)
            if too_long > 0:
                log.warning("request %d: context cut by %d tokens to fit %d", number, too_long, self.max_length)
            kept = context[max(too_long, 0) :]
            key = (tuple(kept), tuple(continuation[:-1]) if self.logits_cache else (number,))
            rows.setdefault(key, ([], kept, continuation))[0].append(number)
        return list(rows.values())

    @torch.no_grad()
    def _read(self, examples: Sequence[TokenExample]) -> list[Tensor]:
        """Return the decode module's hidden states (continuation tokens, hidden) of each example.

        Equal contexts are read once.
        """
        batch = collate(examples).to(self.device)
        first: dict[tuple[int, ...], int] = {}
        places = [first.setdefault(example.prompt, len(first)) for example in examples]
        heads = torch.tensor([places.index(place) for place in range(len(first))], device=self.device)
        distinct = SeamBatch(batch.prefix[heads], batch.rest[heads], batch.labels[heads], batch.starts[heads])
        cache = prefill_batch(self.prefill_module.model, distinct)
        if len(first) < len(examples):
            cache.batch_select_indices(torch.tensor(places, device=self.device))
        hidden = decode_hidden(self.decode_module.model, batch, _in_dtype(cache, self.model.dtype))
        return [row[: len(example.response)] for row, example in zip(hidden, examples, strict=True)]

    @torch.no_grad()
    def _score(self, hidden: Tensor, tokens: Tensor, counts: Sequence[int]) -> list[tuple[float, bool]]:
        """Return (log probability, whether it is the greedy one) of continuations with the same hidden states.

        Args:
            hidden: (T, hidden). tokens: (N, T), N continuations that differ in their last token at most.
            counts: how many tokens of each to score, from the end.
        """
        model = self.decode_module.model
        N, T = tokens.shape
        scored = torch.arange(T, device=tokens.device) >= T - torch.tensor(counts, device=tokens.device)[:, None]
        total = torch.zeros(N, dtype=torch.float64, device=tokens.device)
        greedy = torch.ones(N, dtype=torch.bool, device=tokens.device)
        for piece in position_pieces(T, model.config.vocab_size):
            log_probs = log_probabilities(model, hidden[piece], self.softmax_dtype or torch.float32)
            chosen = log_probs.expand(N, -1, -1).gather(-1, tokens[:, piece, None])[..., 0].double()
            total += chosen.where(scored[:, piece], 0).sum(1)
            greedy &= ((log_probs.argmax(-1) == tokens[:, piece]) | ~scored[:, piece]).all(1)
        return list(zip(total.tolist(), greedy.tolist(), strict=True))

    def _detect_batch_size(self, requests: Sequence[TokenRequest] | None = None, pos: int = 0) -> int:
        """Return the batch size of "auto": the largest, halved from max_batch_size, that fits the longest request."""
        if self.device.type == "cpu":
            return min(CPU_BATCH, self.max_batch_size)
        left = requests[pos:] if requests else [(None, [0], [0] * self.max_length)]
        context, rest = max(len(head) for _, head, _ in left), max(len(tail) for _, _, tail in left)
        return self._largest_batch(TokenExample((0,) * min(context, self.max_length + 1 - rest), (0,) * rest))

    def _largest_batch(self, example: TokenExample) -> int:
        @find_executable_batch_size(starting_batch_size=self.max_batch_size)  # type: ignore[untyped-decorator]
        def fits(batch_size: int) -> int:
            rows = [TokenExample((number, *example.prompt[1:]), example.response) for number in range(batch_size)]
            self._read(rows)  # of different contexts, so that no KV is shared
            return batch_size

        found = fits()
        if self.world_size > 1:
            found = int(self.all_gather(torch.tensor([found], device=self.device)).min())
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate answers. Raises QsunError if one may be as long as the model, which lm-eval only asserts."""
        for request in requests:
            new = normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"]
            if new >= self.max_length:
                raise QsunError(
                    f"max_gen_toks {new} leaves no room for a prompt in max_length {self.max_length}; "
                    f"use {self.max_length - 1} or less in the task's file, or `qsun lm-eval --gen_kwargs`"
                )
        return super().generate_until(requests, disable_tqdm)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        """Continue prompts over the seam.

        Args:
            context: (B, T) token ids, padded on the left; an empty row starts from prefix_token_id.
            max_length: T and the new tokens. stop: strings, the EOS token's among them.
            settings: attention_mask (B, T); do_sample, temperature, top_p, top_k.
        Returns:
            (B, T + longest answer) token ids, context first, padded on the right.
        """
        mask = settings.pop("attention_mask")
        prompts = [row[seen.bool()].tolist() or [self.prefix_token_id] for row, seen in zip(context, mask, strict=True)]
        answers = generate(
            self.prefill_module,
            self.decode_module,
            prompts,
            max_new_tokens=max_length - context.shape[1],
            batch_size=len(prompts),
            **sampling_settings(settings, self.decode_module, len(prompts)),
            **self._ends(stop),
        )
        longest, pad = max(map(len, answers)), self.tokenizer.pad_token_id
        padded = [answer + [pad] * (longest - len(answer)) for answer in answers]
        return torch.cat([context, torch.tensor(padded, dtype=context.dtype, device=context.device)], 1)

    def _ends(self, stop: list[str]) -> dict[str, Any]:
        """Return generate's settings for the end of an answer; stop strings that are a special token become its id."""
        special = dict(zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True))
        # all_special_tokens has only those with a role, and <|eot_id|> and <|im_end|> may have none
        added = self.tokenizer.added_tokens_decoder
        special |= {token.content: number for number, token in added.items() if token.special}
        tokens = {*self.decode_module.eos_tokens, self.eot_token_id}
        tokens |= {special[text] for text in stop if text in special}
        strings = [text for text in stop if text and text not in special]
        spelt = any(token in text for text in strings for token in special)
        return {"stop": strings, "skip_special_tokens": not spelt, "eos": tuple(tokens - {None})}


def _longest_first(rows: list[Any]) -> Any:
    """Return a sort key: long rows first, so that a batch that is too large fails at once; equal contexts together."""
    longest: dict[tuple[int, ...], int] = {}
    for _, context, rest in rows:
        key = tuple(context)
        longest[key] = max(longest.get(key, 0), len(context) + len(rest))
    return lambda row: (-longest[tuple(row[1])], row[1], -len(row[2]), row[2])


def _in_dtype(cache: Any, dtype: torch.dtype) -> Any:
    """Convert the KV of a prefill module to the decode module's dtype."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)
    return cache


@contextmanager
def _without_advice() -> Iterator[None]:
    """Silence HFLM's warning that a loaded model does not work with several processes; here it does."""
    logger = logging.getLogger(HFLM.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
