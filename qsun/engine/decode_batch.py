"""The rows that decode together: each feeds its last token and is given its next, or its next few where drafts hold."""

from collections.abc import Iterator, Set
from typing import Any

from qsun.engine.decode.decode_step import DecodeStep
from qsun.engine.decode.fixed_slots import FixedSlots, has_fixed_shapes
from qsun.engine.decode.slot_cache import SlotCache
from qsun.engine.prefix_cache import LayerKV
from qsun.engine.row import DecodeRow
from qsun.engine.token_choice import ChosenToken, choose

_STEP_TOKENS = 64  # a step with drafts computes no more, as it would then cost more than one without


class DecodeBatch:
    """Rows, in the order of the cache that holds their keys and values.

    Args:
        model: the decode module's causal LM. budget_tokens: of KV, rows x columns.
        static: compute with fixed shapes, as CUDA graphs need; None: on a GPU.
        speculate: most tokens that a row drafts in a step. kv_dtype: see SlotCache.

    Attributes:
        drafted, accepted: tokens so far, and those of them that rows chose too.
    """

    def __init__(
        self,
        model: Any,
        budget_tokens: int,
        static: bool | None = None,
        speculate: int = 0,
        kv_dtype: str = "auto",
    ):
        weight = model.model.embed_tokens.weight
        fixed = has_fixed_shapes(model, static)
        self.cache: SlotCache = (
            FixedSlots(model, budget_tokens, kv_dtype)
            if fixed
            else SlotCache(model.config, weight, budget_tokens, speculate, kv_dtype)
        )
        self.rows: list[DecodeRow] = []
        self._step = DecodeStep(model, self.cache)
        self._speculate = speculate
        self.drafted, self.accepted = 0, 0

    def warm(self, rows: int) -> int:
        """Capture the graphs of steps of up to `rows` rows, before there are any; returns how many there are."""
        return self._step.warm(rows)

    def add(self, row: DecodeRow, layers: LayerKV) -> None:
        self.cache.place(layers, row.request.prefix_tokens, row.request.kv_tokens)
        self.rows.append(row)

    def remove(self, row: DecodeRow, broken: bool = False) -> None:
        """Remove a row; broken: it computed NaN or Inf, which must not stay in its place."""
        place = self.rows.index(row)
        self.cache.release(place, wipe=broken)
        last = self.rows.pop()
        if last is not row:
            self.rows[place] = last

    def remove_ended(self) -> None:
        """Remove the rows that have a `finish`."""
        for row in [row for row in self.rows if row.finish]:
            self.remove(row, broken=row.finish == "error")

    def turns(self, eos: Set[int] = frozenset()) -> Iterator[list[tuple[DecodeRow, ChosenToken]]]:
        """Choose one token for each row, then a further one for each whose draft held; eos: the model's end tokens.

        A row chooses after a drafted token only if that is what it chose itself: by its own settings and random
        numbers, in order, so that it gets the tokens that it gets without drafts. Rows stay until all have chosen;
        one that is given a `finish` meanwhile chooses no more.
        """
        drafts = self._drafts()
        logits = self._step([[row.token, *draft] for row, draft in zip(self.rows, drafts, strict=True)])
        places = list(range(len(self.rows)))
        for turn in range(logits.shape[1]):
            if turn:
                places = [p for p in places if self._holds(self.rows[p], drafts[p], turn)]
                if not places:
                    break
                self.cache.advance(places)
            rows = [self.rows[place] for place in places]
            # a list of places as an index would make the host wait for the step
            chosen = logits[:, turn] if len(places) == len(logits) else logits[places, turn]
            yield list(zip(rows, choose(chosen, rows, eos), strict=True))
        for place, (row, draft) in enumerate(zip(self.rows, drafts, strict=True)):
            if draft and row.drafts is not None:
                self.drafted += len(draft)
                self.accepted += row.drafts.judge(draft)
                if not logits[place, 1 : len(draft) + 1].isfinite().all():  # and so is the KV of what was drafted
                    self.cache.wipe(place, self.cache.filled[place])

    @staticmethod
    def _holds(row: DecodeRow, draft: list[int], turn: int) -> bool:
        return not row.finish and turn <= len(draft) and row.token == draft[turn - 1]

    def _drafts(self) -> list[list[int]]:
        """Return a draft for each row, cut where fewer than half have more: the others are padded to it."""
        room = min(self._speculate, _STEP_TOKENS // len(self.rows) - 1)
        if room < 1:
            return [[] for _ in self.rows]
        drafts = [row.draft(room) for row in self.rows]
        longest = sorted(map(len, drafts))[len(drafts) // 2]
        return [draft[:longest] for draft in drafts]
