"""Documents that rows see at any position: what is encoded once, and what each row adds to it.

```
 a row                  preamble P | document d | document e | question
 encoded once           P            P d  P e   (or d, e: encoded alone, from position 0 on)
 seen by the row at     0 ..         |P| ..      |P| + |d| ..
 computed by the row    what the mode says of d and e; the question
```

A *path* is what is encoded: ids from position 0 on. All paths make one radix tree, so what
documents begin with in common is encoded once as well. A *use* is a document of a row: a path, and
by how much the row's positions lie behind the path's own; a document that a row computes whole is
none. What a mode computes of a row stands in `arrange`; `document_planning.py` does the same for
all rows at once, and the tests hold it to that. What modes leave out: docs/segments.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.plan.radix_tree import RadixTree
from pipeline.plan.row_order import order_rows
from pipeline.plan.token_table import TokenTable

Ids = NDArray[np.int64]
Mode = Literal["concat", "epic", "cacheblend", "kvlink", "packet"]
MOST_LINKED = 40
"""Documents of a row that have link tokens of their own (KVLink, section 3)."""


@dataclass(frozen=True)
class Reuse:
    """How documents are reused. `soft_tokens`: link tokens after a document (kvlink), or tokens
    before and as many after it (packet); their ids begin at `vocabulary_size`. `blend_share`: of
    its documents' tokens, how many a row computes again (cacheblend); the engine chooses which."""

    mode: Mode
    vocabulary_size: int
    is_below_preamble: bool = True
    epic_tokens: int = 0
    soft_tokens: int = 0
    blend_share: float = 0.0

    def count_blended(self, lengths: NDArray[np.int64]) -> int:
        """Of a row whose documents have these lengths; the first is exact below a preamble."""
        return int(np.rint(lengths[int(self.is_below_preamble) :].sum() * self.blend_share))

    @property
    def soft_rows(self) -> int:
        """Rows that an adapter has for it: ids from `vocabulary_size` on."""
        per_document = {"packet": 2, "kvlink": MOST_LINKED}.get(self.mode, 0)
        return per_document * self.soft_tokens

    @property
    def soft_tokens_per_document(self) -> int:
        """By how much each document lengthens a prompt."""
        return {"packet": 2, "kvlink": 1}.get(self.mode, 0) * self.soft_tokens


class Use(NamedTuple):
    """A document of a row: the ids of its path, the position in it from which on the row looks,
    and what is to be added to a position of the path to get that of the row."""

    path: Ids
    first: int
    shift: int


class Run(NamedTuple):
    """Tokens that a row computes itself, at consecutive positions."""

    position: int
    token_ids: Ids


class Arrangement(NamedTuple):
    """Of one row: its preamble, its documents in order, its own tokens in order of position."""

    preamble: Ids
    uses: list[Use]
    runs: list[Run]


def arrange(segments: Sequence[Ids], reuse: Reuse) -> Arrangement:
    """`segments`: preamble, documents, question, each int64; the question is not empty."""
    preamble, *documents, question = segments
    uses, runs, end = [], [], len(preamble)
    before = preamble if reuse.is_below_preamble else preamble[:0]
    for number, document in enumerate(documents):
        own = 0  # tokens of the document that the row computes itself
        if reuse.mode == "epic" and (number or not reuse.is_below_preamble):
            own = min(reuse.epic_tokens, len(document))
        if reuse.mode == "packet":
            head, tail = np.split(reuse.vocabulary_size + np.arange(2 * reuse.soft_tokens), 2)
            document = np.concatenate([head, document, tail])
        if not own or own < len(document):  # else nobody looks at it
            path = np.concatenate([before, document])
            uses.append(Use(path, len(before) + own, end - len(before)))
        if own:
            runs.append(Run(end, document[:own]))
        end += len(document)
        if reuse.mode == "kvlink" and reuse.soft_tokens:
            first = reuse.vocabulary_size + number * reuse.soft_tokens
            runs.append(Run(end, first + np.arange(reuse.soft_tokens)))
            end += reuse.soft_tokens
    return Arrangement(preamble, uses, [*runs, Run(end, question)])


@dataclass(frozen=True, eq=False)
class DocumentPlan:
    """The paths of a job, and what its sequences see of them. Arrays int64.

    `paths`: their ids; `tree` over them, `terminal[path]` the node where it ends. By sequence s,
    half open: documents `use_bounds[s] ..` in `use_path`, `use_first`, `use_shift`; runs
    `run_bounds[s] ..` in `run_position`, `run_length`; row s of `own` holds the ids of its runs,
    end to end. `preamble[s]` is the path of its preamble, -1 without one. `reuse` made all of it.
    """

    reuse: Reuse
    paths: TokenTable
    tree: RadixTree
    terminal: NDArray[np.int64]
    preamble: NDArray[np.int64]
    use_bounds: NDArray[np.int64]
    use_path: NDArray[np.int64]
    use_first: NDArray[np.int64]
    use_shift: NDArray[np.int64]
    own: TokenTable
    run_bounds: NDArray[np.int64]
    run_position: NDArray[np.int64]
    run_length: NDArray[np.int64]

    @property
    def prompt_ends(self) -> NDArray[np.int64]:
        """[sequences] the position after each prompt's last token, soft tokens counted."""
        last = self.run_bounds[1:] - 1
        ends: NDArray[np.int64] = self.run_position[last] + self.run_length[last]
        return ends

    @property
    def kept_tokens(self) -> NDArray[np.int64]:
        """[sequences] prompt tokens whose KV each row holds itself: its own, or where tokens are
        blended a copy of all behind its preamble."""
        if self.reuse.mode != "cacheblend":
            return self.own.lengths
        return self.prompt_ends - self._preamble_tokens

    @property
    def repaired_tokens(self) -> NDArray[np.int64]:
        """[sequences] tokens of documents that each computes though they are encoded once for what
        it sees of these."""
        if self.reuse.mode == "cacheblend":
            return self._blended
        if self.reuse.mode != "epic":
            return np.zeros(len(self.preamble), np.int64)
        above = self._preamble_tokens * self.reuse.is_below_preamble
        counts = np.diff(self.use_bounds)
        upto = np.append(0, np.cumsum(self.use_first - np.repeat(above, counts)))
        repaired: NDArray[np.int64] = upto[self.use_bounds[1:]] - upto[self.use_bounds[:-1]]
        return repaired

    @property
    def _preamble_tokens(self) -> NDArray[np.int64]:
        tokens: NDArray[np.int64] = np.append(self.paths.lengths, 0)[self.preamble]
        return tokens

    @cached_property
    def _blended(self) -> NDArray[np.int64]:
        before = self.use_first  # all of a document is seen: it begins where its context ends
        lengths = np.append(0, np.cumsum(self.paths.lengths[self.use_path] - before))
        first = self.use_bounds[:-1]
        if self.reuse.is_below_preamble:
            first = np.minimum(first + 1, self.use_bounds[1:])
        tokens = lengths[self.use_bounds[1:]] - lengths[first]
        blended: NDArray[np.int64] = np.rint(tokens * self.reuse.blend_share).astype(np.int64)
        return blended

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """[sequences] in the order in which a device should run them."""
        return order_rows(self.use_bounds, self.use_path, self.paths.lengths)

    def users(self, sequences: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(those of `sequences` that need a node, ascending, node after node; [nodes + 1] their
        bounds). A document that a row has twice is one need."""
        wanted = np.zeros(len(self.preamble), bool)
        wanted[sequences] = True
        user = np.repeat(np.arange(len(wanted)), np.diff(self.use_bounds))
        has_preamble = np.flatnonzero(self.preamble >= 0)
        user = np.concatenate([user, has_preamble])
        path = np.concatenate([self.use_path, self.preamble[has_preamble]])
        chosen = wanted[user]
        count, nodes = len(self.preamble), self.tree.num_nodes
        pairs = distinct(self.terminal[path[chosen]] * count + user[chosen])
        seen = [pairs]
        while len(pairs):
            node, of = np.divmod(pairs, count)
            parent = self.tree.parent[node]
            pairs = distinct((parent * count + of)[parent >= 0])
            seen.append(pairs)
        node, of = np.divmod(distinct(np.concatenate(seen)), max(1, count))
        return of, np.searchsorted(node, np.arange(nodes + 1))

    def count_needs(self, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many of `sequences` need each node: [nodes] int64."""
        return np.diff(self.users(sequences)[1])

    def count_own(self, sequences: NDArray[np.int64]) -> int:
        """Tokens that these sequences compute themselves."""
        return int((self.own.lengths + self._blended)[sequences].sum())

    def only(self, sequences: NDArray[np.int64]) -> DocumentPlan:
        """The same paths and tree; of the sequences these (ascending), numbered anew."""
        uses, use_bounds = take_parts(self.use_bounds, sequences)
        runs, run_bounds = take_parts(self.run_bounds, sequences)
        return replace(
            self,
            preamble=self.preamble[sequences],
            use_bounds=use_bounds,
            use_path=self.use_path[uses],
            use_first=self.use_first[uses],
            use_shift=self.use_shift[uses],
            own=self.own.take(sequences),
            run_bounds=run_bounds,
            run_position=self.run_position[runs],
            run_length=self.run_length[runs],
        )

    def tokens_to_compute(self, sequences: NDArray[np.int64]) -> int:
        """Distinct tokens of all that is encoded once, and each sequence's own."""
        encoded = self.tree.edge_lengths[self.count_needs(sequences) > 0].sum()
        return int(encoded) + self.count_own(sequences)


def take_parts(
    bounds: NDArray[np.int64], chosen: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(places of what belongs to `chosen`, their own bounds)."""
    counts = np.diff(bounds)[chosen]
    taken = np.append(0, np.cumsum(counts))
    places = np.arange(taken[-1]) + np.repeat(bounds[chosen] - taken[:-1], counts)
    return places, taken


def distinct(values: Ids) -> Ids:
    """Ascending, each once. `np.unique` of numpy 2.3 hashes them, which takes ten times as long."""
    in_order = np.sort(values)
    is_new = np.ones(len(in_order), bool)
    is_new[1:] = in_order[1:] != in_order[:-1]
    return in_order[is_new]
