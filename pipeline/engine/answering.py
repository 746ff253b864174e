"""The next token of live rows, and which of them end by it. Knows no scheduler and no cache.

A row is looked at by itself only where its token may end it, or where it asks for more than the
likeliest token (`row_kinds`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine import guides, masks
from pipeline.engine.base import EngineHooks, RunControl
from pipeline.engine.ends import ends_by_text, ends_by_token
from pipeline.engine.guides import NO_TOKEN, Guide
from pipeline.engine.live import LiveRow
from pipeline.engine.logprobs import read_logprobs
from pipeline.engine.masks import Mask, likeliest_allowed
from pipeline.engine.request_logits import Context, TokenCounts
from pipeline.engine.row_kinds import RowKinds
from pipeline.engine.sampler import Sampler, has_rules
from pipeline.engine.sampling import Sampled
from pipeline.generation import may_rule_out
from pipeline.plan.plan import Plan
from pipeline.records import FinishReason

LEAST_RUN: Final = 1
"""So many forced tokens wait for a forward together; fewer are decoded one by one."""
Ended = list[tuple[LiveRow, FinishReason]]


@dataclass(frozen=True, slots=True)
class End:
    """A row has said its last token."""

    row: LiveRow
    reason: FinishReason
    now_s: float


class Answering:
    """Grows the answers of one plan's rows."""

    def __init__(
        self, plan: Plan, control: RunControl, hooks: EngineHooks, sampler: Sampler
    ) -> None:
        self._plan: Final = plan
        self._control: Final = control
        self._hooks: Final = hooks
        self._sampler: Final = sampler
        self.kinds: Final = RowKinds(plan, sampler.eos)
        self.has_guides: Final = hooks.force_tokens is None and any(
            p.is_guided for p in plan.params
        )
        self._has_logprobs: Final = any(p.logprobs is not None for p in plan.params)
        self._may_run: Final = plan.conversations is None

    @property
    def is_watched(self) -> bool:
        """Whether the caller sees the logits of each token, or says it."""
        return self._hooks.on_logits is not None or self._hooks.force_tokens is not None

    def append(
        self, rows: list[LiveRow], logits: Tensor, greedy: Sampled | None = None
    ) -> list[tuple[LiveRow, FinishReason]]:
        """Give each row the token that its logits choose, and those that must follow it; returns
        the rows that end, and why. A row whose forced tokens wait for a forward has a `run`.

        logits [rows, V]; `greedy`: the likeliest tokens, where the device has found them already.
        """
        kinds, sound = self.kinds.of(rows), np.ones(len(rows), bool)
        if self.is_watched or not kinds.is_plain.all():
            chosen, sound = self._choose(rows, logits, greedy)
        else:
            chosen = greedy or self._sampler.likeliest(logits)
        lengths = np.array([len(row.token_ids) for row in rows], np.int64)
        events = kinds.ends_by(chosen) | kinds.is_touched | (lengths + 1 >= kinds.most)
        ids = chosen.token_ids.tolist()
        for row, token_id in zip(rows, ids, strict=True):
            row.token_ids.append(token_id)
        ended: Ended = []
        for i in np.flatnonzero(events).tolist():
            row, is_finite = rows[i], bool(chosen.is_finite[i])
            reason = self._take(row, ids[i]) if is_finite else self._fail(row, bool(sound[i]))
            if reason:
                ended.append((row, reason))
        if self.has_guides:
            ended += self._complete(rows, ended, logits)
        return ended

    def _choose(
        self, rows: list[LiveRow], logits: Tensor, greedy: Sampled | None
    ) -> tuple[Sampled, NDArray[np.bool_]]:
        """The next tokens of rows of any kind, and which rows had any before some were ruled out;
        what is asked about the logits is answered."""
        positions = np.array([len(r.params.opening) + len(r.token_ids) for r in rows], np.int64)
        sequences = [r.sequence for r in rows]
        numbers = [r.num_answered + len(r.token_ids) for r in rows]
        keys = np.array([r.noise_key for r in rows], np.uint64)
        if self._hooks.on_logits is not None:
            self._hooks.on_logits(sequences, numbers, logits)
        asked: list[int] = []
        if self._has_logprobs:
            asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
        raw = logits[asked] if asked else None  # a copy: tokens may be ruled out in place
        params = [r.params for r in rows]
        sound = np.ones(len(rows), bool)
        if self.has_guides:
            self._begin(rows)
            greedy, sound = self._masked(rows, logits, greedy)
        chosen = self._sampler.sample(
            logits, params, keys, positions, lambda i: self._context(rows[i]), greedy
        )
        if self._hooks.force_tokens is not None:
            forced = self._hooks.force_tokens(sequences, numbers)
            chosen = chosen._replace(token_ids=np.array(forced, np.int64))
        if raw is not None:
            _note_logprobs([rows[i] for i in asked], raw, chosen.token_ids[asked].tolist())
        return chosen, sound

    def _begin(self, rows: Sequence[LiveRow]) -> None:
        """Guides of rows that say their first token."""
        grammars = self._control.grammars
        assert grammars is not None, "a plan with constraints needs grammars"
        for row in rows:
            if row.guide is None and row.params.is_guided:
                row.guide = Guide(grammars, row.params, self._prompt(row), self._sampler.eos)

    def _masked(
        self, rows: Sequence[LiveRow], logits: Tensor, greedy: Sampled | None
    ) -> tuple[Sampled | None, NDArray[np.bool_]]:
        """The likeliest tokens of all rows that they may say, and which rows had any before; what
        rows that are drawn may not say is ruled out in place.

        Of most greedy rows the likeliest token is allowed or one is forced, and then nobody asks
        for all others.
        """
        guided = [(i, r.guide) for i, r in enumerate(rows) if r.guide and r.guide.is_masking]
        if not guided:
            return greedy, np.zeros(len(rows), bool)
        greedy = greedy or self._sampler.likeliest(logits)
        token_ids, sound = greedy.token_ids.tolist(), greedy.is_finite.tolist()
        drawn: dict[int, Guide] = {}
        wrong: dict[int, Guide] = {}
        forced: dict[int, int] = {}
        for i, guide in guided:
            if not rows[i].params.is_greedy or has_rules(rows[i].params):
                drawn[i] = guide
            elif (token_id := guide.next_forced()) is not None:
                forced[i] = token_id
            elif sound[i] and not guide.allows(token_ids[i]):
                wrong[i] = guide
        ids, finite = greedy.token_ids.copy(), greedy.is_finite.copy()
        likeliest = self._sampler.likeliest
        if forced:
            ids[[*forced]] = [*forced.values()]
            finite[[*forced]] = logits[[*forced], [*forced.values()]].isfinite().cpu().numpy()
        if drawn:
            masks.apply(logits, list(drawn), self._masks(drawn, logits))
            ids[[*drawn]], finite[[*drawn]] = likeliest(logits[[*drawn]])
        if wrong:
            found = self._masks(wrong, logits)
            ids[[*wrong]], finite[[*wrong]] = likeliest_allowed(logits, [*wrong], found, likeliest)
        return Sampled(ids, finite & greedy.is_finite), greedy.is_finite

    def _masks(self, guided: Mapping[int, Guide], logits: Tensor) -> list[Mask]:
        grammars = self._control.grammars
        assert grammars is not None
        guides.prepare(grammars, [*guided.values()], logits.shape[1])
        return [guide.mask for guide in guided.values() if guide.mask is not None]

    def _take(self, row: LiveRow, token_id: int) -> FinishReason | None:
        """The row has said a token: whether it ends by it, or by one that must follow."""
        guide = row.guide
        if guide is not None:
            guide.accept(token_id)
        reason = self.why_over(row)
        if reason or guide is None or not self._may_run or may_rule_out(row.params):
            return reason
        while reason is None and len(forced := guide.forced()) >= LEAST_RUN:
            for following in forced:
                row.token_ids.append(following)
                row.run += 1
                guide.accept(following)
                reason = self.why_over(row)
                if reason:
                    break
        row.forced_tokens += row.run
        return None if reason and self._waits(row, reason) else reason

    def _waits(self, row: LiveRow, reason: FinishReason) -> bool:
        """Whether a row that is over waits for what is to be read of its last tokens."""
        if reason == "error" or not row.is_unread:
            return False
        row.over = reason
        return True

    def _complete(self, rows: Sequence[LiveRow], ended: Ended, logits: Tensor) -> Ended:
        """Rows that may end where they are, and have nothing more to say."""
        over = {id(row) for row, _ in ended}
        alive = [row for row in rows if row.over is None and id(row) not in over]
        going = [(row, row.guide) for row in alive if row.guide and row.guide.may_end]
        if not going:
            return []
        self._masks(dict(enumerate(guide for _, guide in going)), logits)
        ended_now = [row for row, guide in going if guide.is_over]
        return [(row, "stop") for row in ended_now if not self._waits(row, "stop")]

    def _fail(self, row: LiveRow, is_sound: bool) -> FinishReason:
        """No token can be chosen; `is_sound`: before something was ruled out one could."""
        if row.guide is not None and is_sound:
            row.fault = NO_TOKEN
        return "error"

    def why_over(self, row: LiveRow) -> FinishReason | None:
        """By all that it has said; None: it goes on."""
        params, guide = row.params, row.guide
        if guide is not None and guide.fault is not None:
            row.fault = guide.fault
            return "error"
        if ends_by_token(row.token_ids[-1], params, self._sampler.eos):
            return "stop"
        if guide is not None and guide.is_over:
            return "stop"
        if params.stop:
            stops = self._control.is_stopped
            if ends_by_text(stops, row.token_ids, params, self._question(row)):
                return "stop"
        if len(row.token_ids) < params.max_new_tokens:
            return None
        return "stop" if guide is not None and self._is_complete(guide) else "length"

    def _is_complete(self, guide: Guide) -> bool:
        """Of an answer that has no room left, by the mask of the token that it has no room for."""
        grammars = self._control.grammars
        assert grammars is not None
        if guide.may_end:
            guides.prepare(grammars, [guide], grammars.vocabulary_size)
        return guide.is_over

    def _context(self, row: LiveRow) -> Context:
        """As if the opening had been decoded."""
        if row.counts is None:
            row.counts = TokenCounts()
        prompt, opening = self._prompt(row), row.params.opening
        if not opening:
            return Context(prompt, row.token_ids, row.counts)
        return Context(prompt[: -len(opening)], [*opening, *row.token_ids], row.counts)

    def _prompt(self, row: LiveRow) -> NDArray[np.unsignedinteger]:
        """What its answer follows, the history of a conversation included."""
        if row.conversation is None:
            return self._plan.prompt_token_ids(row.sequence)
        return np.array(row.conversation.ids[: row.conversation.question_end], np.uint32)

    def _question(self, row: LiveRow) -> NDArray[np.unsignedinteger]:
        """What its answer follows right away: of a conversation, this turn's alone."""
        conversation = row.conversation
        if conversation is None:
            return self._plan.prompt_token_ids(row.sequence)
        first, end = conversation.turn_starts[-1], conversation.question_end
        return np.array(conversation.ids[first:end], np.uint32)


def _note_logprobs(rows: list[LiveRow], logits: Tensor, token_ids: list[int]) -> None:
    found = read_logprobs(logits, token_ids, [row.params.logprobs or 0 for row in rows])
    for row, logprobs in zip(rows, found, strict=True):
        row.logprobs.append(logprobs)
