"""Which turns of conversations can run, and the plan of those that do.

```
 turns of a conversation    0 ok   1 ok   2 failed   3 ok   4 failed
 rows                       run    run    its error  PriorTurnFailed ..
```

A turn follows the answers of all turns before it, so a turn that cannot run takes its later ones
with it; the earlier ones run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.inputs.turns import Turns
from pipeline.job.planning_limits import check_samples
from pipeline.plan.conversation_planning import Chains, plan_conversations
from pipeline.plan.conversations import CONTEXT_EXCEEDED, Eviction
from pipeline.plan.plan import Names, Plan, build_plan
from pipeline.plan.token_table import TokenTable
from pipeline.prompts import Rejected
from pipeline.records import PRIOR_TURN_FAILED, SamplingParams


class Asked(NamedTuple):
    """What rows ask: their tokens, parameters (`params_of_row` indexes `params`), and of those that
    begin a conversation how long its system message is."""

    table: TokenTable
    params: tuple[SamplingParams, ...]
    params_of_row: NDArray[np.integer]
    system_tokens: NDArray[np.int64]


class Splits(NamedTuple):
    """How `build_plan` splits and shares: ids that noise is drawn by, tenants, limits."""

    names: Names
    tenant: NDArray[np.integer]
    min_prefix_tokens: int
    sort_bytes: int


def plan_turns(
    asked: Asked,
    turns: Turns,
    rejected: Mapping[int, Rejected],
    eviction: Eviction,
    splits: Splits,
) -> tuple[Plan, dict[int, Rejected]]:
    """The plan, and all rows that cannot run, `rejected` among them."""
    found = dict(rejected) | find_too_long(asked, turns, eviction, rejected)
    found |= find_beyond_limit(asked, turns, eviction, found)
    chains, later = chain(turns, found, asked.system_tokens)
    found |= later
    lengths = asked.table.lengths.copy()
    lengths[list(found)] = 0
    table = replace(asked.table, lengths=lengths)
    plan = plan_conversations(
        partial(build, asked, splits), table, splits.names, asked.params_of_row, chains, eviction
    )
    return plan, found


def build(asked: Asked, splits: Splits, table: TokenTable, kinds: NDArray[np.int64] | None) -> Plan:
    """`build_plan` of another table with as many rows. Raises InputError for too many samples."""
    check_samples(asked.params, asked.params_of_row, table.lengths > 0)
    return build_plan(
        table,
        splits.names,
        asked.params,
        asked.params_of_row,
        splits.tenant,
        splits.min_prefix_tokens,
        splits.sort_bytes,
        kinds,
    )


def find_too_long(
    asked: Asked, turns: Turns, eviction: Eviction, rejected: Mapping[int, Rejected]
) -> dict[int, Rejected]:
    """Turns that fit no budget, whatever is evicted: by row. What always stays is the system
    message (but by "window") and the turn's own prompt, and an answer needs a token."""
    if eviction.evictor == "none":
        return {}  # a turn that exceeds the window by itself was found when it was tokenised
    rows, first = turns.order, turns.order[turns.bounds[:-1]]
    own = asked.table.lengths[rows]
    before = np.repeat(asked.system_tokens[first], np.diff(turns.bounds))
    before[turns.is_first[rows]] = 0  # it is part of the turn
    if eviction.evictor == "window":
        before[:] = 0
    needed = before + own + 1
    found = {}
    for place in np.flatnonzero((own > 0) & (needed > eviction.budget_tokens)).tolist():
        row = int(rows[place])
        if row not in rejected:
            room = eviction.budget_tokens - int(before[place]) - 1
            message = (
                f"the turn has {own[place]} tokens, and beside the {before[place]} that always "
                f"stay there is room for {room}; cut it, or raise --budget-tokens"
            )
            found[row] = Rejected(row, "TurnTooLong", message)
    return found


def find_beyond_limit(
    asked: Asked, turns: Turns, eviction: Eviction, rejected: Mapping[int, Rejected]
) -> dict[int, Rejected]:
    """The first turn of each conversation for which nothing is left even if each answer before it
    has one token, which may be the one that the next turn begins with: by row."""
    rows = turns.order
    tokens = _sums_so_far(asked.table.lengths[rows], turns)
    is_rejected = np.zeros(len(turns.turn), np.int64)
    is_rejected[list(rejected)] = 1
    runs = _sums_so_far(is_rejected[rows], turns) == 0
    is_over = tokens >= eviction.limits(asked.params)[asked.params_of_row[rows]]
    places = np.flatnonzero(is_over & runs & ~turns.is_first[rows])
    first = np.unique(turns.conversation[rows[places]], return_index=True)[1]
    found = {}
    for place in places[first].tolist():
        row = int(rows[place])
        params = asked.params[int(asked.params_of_row[row])]
        message = eviction.why_full(params, f"at least {tokens[place]}")
        found[row] = Rejected(row, CONTEXT_EXCEEDED, message)
    return found


def _sums_so_far(values: NDArray[np.int64], turns: Turns) -> NDArray[np.int64]:
    """Of each turn in order and those before it in its conversation."""
    upto = np.append(0, np.cumsum(values))
    before = np.repeat(upto[turns.bounds[:-1]], np.diff(turns.bounds))
    sums: NDArray[np.int64] = upto[1:] - before
    return sums


def chain(
    turns: Turns, rejected: Mapping[int, Rejected], system_tokens: NDArray[np.int64]
) -> tuple[Chains, dict[int, Rejected]]:
    """Turns that can run, in order; and those that cannot since one before them failed."""
    rows, bounds = turns.order, turns.bounds
    is_rejected = np.zeros(len(turns.turn), bool)
    is_rejected[list(rejected)] = True
    failed = is_rejected[rows]
    upto = np.append(0, np.cumsum(failed))
    counts = np.diff(bounds)
    before = upto[:-1] - np.repeat(upto[bounds[:-1]], counts)
    runs = ~failed & (before == 0)
    left = (
        np.add.reduceat(runs.astype(np.int64), bounds[:-1]) if len(rows) else np.zeros(0, np.int64)
    )
    begun = np.flatnonzero(left)
    chains = Chains(
        np.append(0, np.cumsum(left[begun])), rows[runs], system_tokens[rows[bounds[begun]]]
    )
    return chains, _followers(turns, np.flatnonzero(~failed & ~runs), np.flatnonzero(failed))


def _followers(
    turns: Turns, places: NDArray[np.int64], failed: NDArray[np.int64]
) -> dict[int, Rejected]:
    """Rows at these places of the order, each behind one of `failed` in its conversation."""
    if not len(places):
        return {}
    rows = turns.order
    starts = turns.bounds[np.searchsorted(turns.bounds, places, side="right") - 1]
    causes = rows[failed[np.searchsorted(failed, starts)]]
    found = {}
    for row, cause in zip(rows[places].tolist(), causes.tolist(), strict=True):
        if cause in turns.faults:
            said = f"the row {cause} of its conversation has no place, so nobody knows what came"
            message = f"{said} before this turn"
        else:
            message = (
                f"turn {turns.turn[cause]} of its conversation (row {cause}) cannot run, and this "
                "turn would follow its answer"
            )
        found[row] = Rejected(row, PRIOR_TURN_FAILED, message)
    return found
