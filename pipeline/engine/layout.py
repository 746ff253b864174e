"""Where the tokens of a row lie, asked of one object. Knows positions, no slots.

`PrefixLayout`: a node of the plan's tree that several sequences see is a span, and stands at the
same position in all rows below it. `DocumentLayout`: every node of the paths is a span; a row sees
those of its documents as they stand in their own frames.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.plan.document_order import run_order
from pipeline.plan.documents import DocumentPlan
from pipeline.plan.plan import Plan
from pipeline.plan.token_table import Ids

Positions = NDArray[np.int64]
ChooseTokens = Callable[[Positions, list[Positions]], Positions]
"""Given the ids of a row's preamble and documents, the positions that it computes again."""


class SharedPart(NamedTuple):
    """A span that other sequences may see as well, and the `key` of the one it stands below.

    `key` says what it holds. Positions: of its first token, of the first that is not a copy, and
    the one after its last; `ids` are those of the path from position 0 on.
    """

    key: int
    above: int | None
    position: int
    start: int
    end: int
    ids: Ids


class SeenDocument(NamedTuple):
    """A document of a row: it ends with the part `key`, is looked at from position `first` of its
    own frame on, and stands `shift` positions later in the row."""

    key: int
    first: int
    shift: int


class OwnRun(NamedTuple):
    """Own tokens of a row at consecutive positions from `position` on: `length` from the row's own
    token number `offset` on."""

    offset: int
    length: int
    position: int


class RowLayout(NamedTuple):
    """The shared parts that a row needs, parents first, and the key of the one that its own tokens
    stand below; its own tokens by their positions, as in `SharedPart`.

    Where its own tokens stand between documents, `runs` are those before the last one, and
    `position` is where the first would stand if all of them lay right before the last run.
    `repaired`: its own tokens that a document holds as well.

    `assembled`: the row keeps a copy of all that it sees of documents, from `position` on, and
    computes again the tokens at these positions; its own are those, and then the question's.
    """

    shared: list[SharedPart]
    above: int | None
    position: int
    start: int
    end: int
    ids: Ids
    documents: tuple[SeenDocument, ...] = ()
    runs: tuple[OwnRun, ...] = ()
    repaired: int = 0
    assembled: Positions | None = None


class Layout(Protocol):
    """By part: `below`, as many of the sequences see it, and `ending`, as many end exactly there;
    int64 both. `order`: the sequences as they shall run. `most_tokens`: slots that would hold
    everything at the same time."""

    order: NDArray[np.int64]
    below: NDArray[np.int64]
    ending: NDArray[np.int64]
    most_tokens: int

    def of(self, sequence: int) -> RowLayout:
        """The layout of one of the sequences."""

    def next_use(self, key: int, sequence: int) -> int:
        """What comes later the later a part is needed again, from `sequence` on."""


def layout_of(
    plan: Plan, sequences: NDArray[np.int64], choose: ChooseTokens | None = None
) -> Layout:
    """The one that the plan asks for; `choose` where documents are blended."""
    if plan.documents is None:
        return PrefixLayout(plan, sequences)
    return DocumentLayout(plan, plan.documents, sequences, choose)


class PrefixLayout:
    """See `Layout`. Rows share prefixes."""

    def __init__(self, plan: Plan, sequences: NDArray[np.int64]) -> None:
        self.order = sequences
        self._plan = plan
        self._lengths = plan.prompt_lengths
        terminal = plan.tree.terminal[plan.sequences.prompt[sequences]]
        self.below = plan.count_below(sequences)
        self.ending = np.bincount(terminal, minlength=plan.tree.num_nodes)
        position = np.where(plan.is_group, plan.anchor_end, plan.tree.start)
        spans = (plan.tree.end - position)[self.below > 1].sum()
        rows = int(plan.most_tokens[sequences].sum())
        if plan.evicts:  # or what is given back and taken again must be moved together all the time
            rows += rows // 4
        self.most_tokens = int(spans) + rows

    def of(self, sequence: int) -> RowLayout:
        """A group node's span begins where the one above it ends, so it has copies of the short
        edges between them; so does the row's own."""
        plan, tree, covered = self._plan, self._plan.tree, 0
        ids = plan.prompt_token_ids(sequence)
        shared: list[SharedPart] = []
        above = None
        for node in tree.path(int(tree.terminal[plan.sequences.prompt[sequence]])):
            if self.below[node] > 1:
                start, end = int(tree.start[node]), int(tree.end[node])
                is_group = bool(plan.is_group[node])
                position = int(plan.anchor_end[node]) if is_group else start
                shared.append(SharedPart(node, above, position, start, end, ids))
                covered, above = end if is_group else covered, node
        start, length = shared[-1].end if shared else 0, int(self._lengths[sequence])
        return RowLayout(shared, above, covered, start, length, ids[start:])

    def next_use(self, key: int, sequence: int) -> int:
        """Nodes are numbered depth first, as sequences are."""
        return key


class DocumentLayout:
    """See `Layout`. Rows see documents at any position; each part is a node of the paths."""

    def __init__(
        self,
        plan: Plan,
        documents: DocumentPlan,
        sequences: NDArray[np.int64],
        choose: ChooseTokens | None = None,
    ) -> None:
        self._choose = choose
        self._chosen: dict[int, Positions] = {}
        self.order = run_order(documents, sequences)
        self._plan = documents
        self._turn = np.full(len(documents.preamble), len(sequences))
        self._turn[self.order] = np.arange(len(sequences))
        users, self._bounds = documents.users(sequences)
        self.below = np.diff(self._bounds)
        turns, node = self._turn[users], np.repeat(np.arange(len(self.below)), self.below)
        self._turns = turns[np.lexsort((turns, node))]
        self._repaired = documents.repaired_tokens
        self.ending = np.zeros(documents.tree.num_nodes, np.int64)
        new_tokens = plan.max_new_tokens[sequences] - 1
        encoded = documents.tree.edge_lengths[self.below > 0]
        kept = documents.kept_tokens[sequences] + new_tokens
        self.most_tokens = int(encoded.sum() + kept.sum())

    def of(self, sequence: int) -> RowLayout:
        plan, parts = self._plan, dict[int, SharedPart]()
        preamble = int(plan.preamble[sequence])
        above = None if preamble < 0 else self._add_path(preamble, parts)
        low, high = plan.use_bounds[sequence : sequence + 2].tolist()
        seen = tuple(
            SeenDocument(self._add_path(path, parts), first, shift)
            for path, first, shift in zip(
                plan.use_path[low:high].tolist(),
                plan.use_first[low:high].tolist(),
                plan.use_shift[low:high].tolist(),
                strict=True,
            )
        )
        low, high = plan.run_bounds[sequence : sequence + 2].tolist()
        lengths = plan.run_length[low:high]
        offsets = (np.cumsum(lengths) - lengths).tolist()
        runs = [*map(OwnRun, offsets, lengths.tolist(), plan.run_position[low:high].tolist())]
        if self._choose is not None and seen:
            return self._assemble(sequence, parts, above, seen)
        ids, last = plan.own[sequence], runs[-1]
        position = last.position - last.offset
        end = last.position + last.length
        return RowLayout(
            [*parts.values()], above, position, position, end, ids, seen, tuple(runs[:-1]),
            int(self._repaired[sequence]),
        )  # fmt: skip

    def _assemble(
        self,
        sequence: int,
        parts: dict[int, SharedPart],
        above: int | None,
        seen: tuple[SeenDocument, ...],
    ) -> RowLayout:
        assert self._choose is not None
        plan, position = self._plan, 0 if above is None else parts[above].end
        low, high = plan.use_bounds[sequence : sequence + 2].tolist()
        paths = [plan.paths[path].astype(np.int64) for path in plan.use_path[low:high].tolist()]
        documents = [ids[at.first :] for ids, at in zip(paths, seen, strict=True)]
        preamble = np.zeros(0, np.int64) if above is None else parts[above].ids.astype(np.int64)
        if sequence not in self._chosen:  # a row that finds no room is asked for again
            self._chosen[sequence] = self._choose(preamble[:position], documents)
        chosen = self._chosen[sequence]
        own = np.concatenate([np.concatenate(documents)[chosen - position], plan.own[sequence]])
        end = int(plan.prompt_ends[sequence])
        return RowLayout(
            [*parts.values()], above, position, end - len(own), end, own, seen, (), len(chosen),
            chosen,
        )  # fmt: skip

    def next_use(self, key: int, sequence: int) -> int:
        turns = self._turns[self._bounds[key] : self._bounds[key + 1]]
        place = int(np.searchsorted(turns, self._turn[sequence]))
        return int(turns[place]) if place < len(turns) else len(self.order)

    def _add_path(self, path: int, parts: dict[int, SharedPart]) -> int:
        """The key of its last part, after all of them are in `parts`."""
        plan, above = self._plan, None
        for node in plan.tree.path(int(plan.terminal[path])):
            if node not in parts:
                start, end = int(plan.tree.start[node]), int(plan.tree.end[node])
                parts[node] = SharedPart(node, above, start, start, end, plan.paths[path])
            above = node
        assert above is not None, "a path is not empty"
        return above
