"""Sequences that arrive: where their tokens stand becomes spans and placements. Moves no memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.engine.base import EarlierTurns
from pipeline.engine.conversation import Conversation
from pipeline.engine.document_placements import AssembledPlacement, ScatteredPlacement
from pipeline.engine.kv_connector import KVConnector
from pipeline.engine.layout import Layout, RowLayout, SharedPart
from pipeline.engine.live import LiveRow, PrefillJob
from pipeline.engine.packing import SeenDocuments
from pipeline.engine.residency import Residency
from pipeline.engine.spans import (
    KVSpan,
    Placement,
    SharedPlacement,
    SharedSpan,
    slots_from,
)
from pipeline.plan.conversations import ConversationPlan, join_ids
from pipeline.plan.plan import Plan
from pipeline.plan.token_table import Ids
from pipeline.records import EarlierTurn


@dataclass(frozen=True)
class History:
    """What was computed before this scheduler: work that is done again is not counted twice.

    `connector`: of earlier runs, to be loaded; `earlier_turns` of conversations; `spans`: keys of
    shared ones; `cached_tokens`: of sequences that were admitted; `forgotten`: sequences that the
    caller took back; `begun`: (sequence, turn) of later turns whose prompts were computed.
    """

    connector: KVConnector | None = None
    earlier_turns: EarlierTurns | None = None
    spans: set[int] = field(default_factory=set)
    cached_tokens: dict[int, int] = field(default_factory=dict)
    forgotten: set[int] = field(default_factory=set)
    begun: set[tuple[int, int]] = field(default_factory=set)


class Arrivals:
    """Makes the rows of sequences, and places the shared spans that nobody needed before."""

    def __init__(self, plan: Plan, layout: Layout, residency: Residency, history: History) -> None:
        self._plan = plan
        self._layout = layout
        self._residency = residency
        self._history = history

    def row(self, sequence: int, now_s: float) -> LiveRow:
        """Without blocks; spans that it needs are placed, and resident or not."""
        layout = self._layout.of(sequence)
        placed = self._residency.placed
        for part in layout.shared:
            if part.key not in placed:
                self._place(part, sequence)
        above = None if layout.above is None else placed[layout.above]
        position, end = layout.position, layout.end
        stored_end = 0
        if not layout.documents:  # else its KV depends on them, and on how they were encoded
            prompt = self._plan.prompt_token_ids(sequence)
            stored_end = min(self._stored_end(above, sequence, prompt[:end]), end - 1)
            stored_end = min(stored_end, self._first_read(sequence, layout.start, end))
        own = KVSpan(
            length=end - position, copied=layout.start - position, storable=stored_end - position
        )
        params = self._plan.params[int(self._plan.sequences.params[sequence])]
        place = Placement(own, position, above)
        if layout.documents:
            place = self._among_documents(place, layout)
        row = LiveRow(sequence, params, place, layout.ids, end, now_s, layout.repaired)
        row.noise_key = int(self._plan.sequences.noise_key[sequence])
        if self._plan.conversations is not None:
            earlier = self._history.earlier_turns
            done = () if earlier is None else earlier(sequence)
            self._open_conversation(row, self._plan.conversations, done)
        return row

    def job(
        self,
        target: SharedPlacement | LiveRow,
        own: NDArray[np.int64],
        is_repeat: bool,
        sequence: int,
    ) -> PrefillJob:
        """What is to be computed of `own`, the ids from `place.start` on; the rest is loaded."""
        place = target.place if isinstance(target, LiveRow) else target
        job = PrefillJob(target, own, place.start, is_repeat)
        connector = self._history.connector
        if connector is not None and place.stored_end > place.start:
            ids = (
                self._plan.prompt_token_ids(sequence)
                if isinstance(target, LiveRow)
                else target.span.ids
            )
            job.loaded = connector.load(sequence, ids, place.position, place.stored_end)
            job.done = place.start if job.loaded is None else place.stored_end
        return job

    def _open_conversation(
        self, row: LiveRow, plan: ConversationPlan, done: Sequence[EarlierTurn]
    ) -> None:
        """The row goes on after the turns that were answered before."""
        turns, eviction = plan.turns(row.sequence), plan.eviction
        ids = self._plan.prompt_token_ids(row.sequence).astype(np.int64).tolist()
        conversation = Conversation(
            eviction=eviction,
            turns=turns,
            system=int(plan.system_tokens[row.sequence]),
            most_slots=int(self._plan.most_tokens[row.sequence]),
            first_place=row.place,
            ids=ids,
            computed=len(ids),
            blocks=row.blocks,
            turn_starts=[0],
            question_end=len(ids),
        )
        row.conversation = conversation
        conversation.begin(len(ids))
        for number, turn in enumerate(done):
            if number:
                row_of_turn = int(plan.row[turns[number]])
                conversation.ask(join_ids(row.token_ids[-1], self._plan.table[row_of_turn]))
            conversation.log += turn.eviction_log
            conversation.ids += turn.token_ids[:-1]
            row.token_ids = list(turn.token_ids)
            row.num_answered += len(row.token_ids)
            row.is_waiting = True
        conversation.number = max(0, len(done) - 1)

    def _among_documents(self, place: Placement, layout: RowLayout) -> Placement:
        placed, documents = self._residency.placed, layout.documents
        ends = [placed[document.key] for document in documents]
        keys, first, shift = np.array(documents, np.int64).T
        seen = SeenDocuments(
            np.stack([keys, first], 1), shift, lambda i: slots_from(ends[i], documents[i].first)
        )
        needs = tuple(placed[part.key] for part in layout.shared)
        if layout.assembled is not None:
            return AssembledPlacement(
                place.span, place.position, place.above, seen, needs, layout.assembled
            )
        return ScatteredPlacement(place.span, place.position, place.above, seen, needs, layout.runs)

    def _place(self, part: SharedPart, sequence: int) -> None:
        """`sequence` is one of those that see it; what it stands below is placed."""
        key, position, start, end = part.key, part.position, part.start, part.end
        above = None if part.above is None else self._residency.placed[part.above]
        count, unread = int(self._layout.below[key]), int(self._layout.ending[key])
        stored_end = self._stored_end(above, sequence, part.ids[:end])
        if unread:  # the logits of a prompt's last token are stored nowhere
            stored_end = min(stored_end, end - 1)
        if self._plan.scores is not None:
            stored_end = min(stored_end, self._plan.scores.first_position(key, end))
        span = SharedSpan(
            key=key,
            ids=part.ids,
            sequence=sequence,
            length=end - position,
            copied=start - position,
            storable=stored_end - position,
            num_sequences=count,
            unfinished=count,
            unread=unread,
            was_computed=key in self._history.spans,
        )
        self._residency.placed[key] = SharedPlacement(span, position, above)

    def _first_read(self, sequence: int, start: int, end: int) -> int:
        """The first of positions `[start, end)` whose logits are read: that is never loaded."""
        plan = self._plan
        if plan.scores is None:
            return end
        path = plan.tree.path(int(plan.tree.terminal[plan.sequences.prompt[sequence]]))
        below = [node for node in path if plan.tree.end[node] > start]
        return min((plan.scores.first_position(node, end) for node in below), default=end)

    def _stored_end(self, above: SharedPlacement | None, sequence: int, ids: Ids) -> int:
        """Position up to which an earlier run's KV can be loaded of a path, for what stands below
        `above`.

        What is not stored above is not stored below, but for a last token that logits are made of.
        """
        connector = self._history.connector
        if connector is None or (above is not None and above.stored_end < above.end - 1):
            return 0
        return connector.stored_end(sequence, ids)
