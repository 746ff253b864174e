"""A job and the KV store of earlier ones: what it loads, what it leaves behind.

Which prefixes are worth keeping and loading; `kvstore/connector.py` does it while the engine runs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UsageError
from pipeline.job.job import Job
from pipeline.job.observer import Observer
from pipeline.job.planning import PlannedJob
from pipeline.model.identity import describe_versions
from pipeline.model.machine import cpu_description
from pipeline.model.rates import recall_rates
from pipeline.plan.plan import Plan
from pipeline.settings import JobSettings

if TYPE_CHECKING:
    from pipeline.engine.base import Engine, KVConnector
    from pipeline.kvstore.identity import Identity
    from pipeline.kvstore.store import KVStore


@dataclass(frozen=True)
class PlannedPrompts:
    """The `Prompts` of a plan, see `kvstore/connector.py`."""

    planned: PlannedJob

    def ids(self, sequence: int) -> NDArray[np.uint32]:
        return self.planned.plan.prompt_token_ids(sequence).astype(np.uint32)

    def tenant(self, sequence: int) -> str:
        return self.planned.tenant(sequence)


def nodes_to_keep(
    plan: Plan, sequences: NDArray[np.int64], least: int, room: int
) -> NDArray[np.bool_]:
    """[nodes] whether a node's KV is worth keeping for the jobs of other nights.

    Those that most of `sequences` share, at least two, until `room` tokens are full; of these the
    paths down to a depth of at least `least` tokens, where loading beats computing.
    """
    tree, below = plan.tree, plan.count_below(sequences)
    order = np.lexsort((tree.end, -below))  # parents first: no child is shared by more
    order = order[below[order] > 1]
    fits = np.cumsum(tree.edge_lengths[order]) <= room
    kept = np.zeros(tree.num_nodes, bool)
    kept[order[: len(order) if fits.all() else int(np.argmin(fits))]] = True
    is_deep = kept & (tree.end >= least)
    # A node above a deep one has its first sequence in its own range, and no deep node is above it.
    deep_before = np.zeros(len(plan.sequences) + 1, np.int64)
    np.add.at(deep_before, plan.sequence_lo[is_deep] + 1, 1)
    deep_before = np.cumsum(deep_before)
    has_deep = deep_before[plan.sequence_hi] > deep_before[plan.sequence_lo]
    return kept & (is_deep | has_deep)


def kv_identity(
    settings: JobSettings, identity: Mapping[str, Any], tokenizer: str, dtype: str
) -> Identity:
    """What the KV of a job depends on besides its token ids.

    `identity`: of the model, as of `identify_model`; `dtype`: of the loaded weights.
    """
    from pipeline.kvstore.identity import Identity
    from pipeline.model.shape import read_rope, read_shape

    model = settings.model
    shape = read_shape(model.model, model.revision)
    content: dict[str, Any] = dict(identity)
    if settings.engine.fidelity == "strict":  # whose bits are those of one machine
        content["strict"] = [describe_versions(), cpu_description(), os.cpu_count()]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    layout = (shape.num_layers, shape.num_kv_heads, shape.head_dim)
    rope = json.dumps(read_rope(model.model, model.revision), sort_keys=True)
    return Identity(digest, tokenizer, dtype, layout, rope)


@contextmanager
def recycling(
    engine: Engine, planned: PlannedJob, sequences: NDArray[np.int64], observer: Observer
) -> Iterator[KVConnector | None]:
    """States for the engine to load from `--kv-store`, and to keep there for later runs.

    None, and the observer is told why, where the engine has no KV of its own or loading would not
    pay. Raises UsageError where the folder cannot be a store.
    """
    settings = planned.job.settings
    folder = settings.recycle.kv_store
    if folder is None:
        yield None
        return
    kv = engine.capabilities.kv
    if kv is None:
        on_ray = settings.fleet.executor == "ray"
        who = "a worker on Ray" if on_ray else f"the {engine.name} engine"
        observer.say(f"--kv-store is left out: {who} keeps no KV of prefixes")
        yield None
        return
    from pipeline.kvstore.connector import StoreConnector
    from pipeline.kvstore.store import KVStore

    job = planned.job
    identity = kv_identity(settings, job.model_identity, job.tokenizer.fingerprint, kv.dtype)
    least = least_depth(job, identity, kv.bytes_per_token)
    if least is None:
        observer.say("--kv-store is left out: here computing a prefix is faster than loading it")
        yield None
        return
    budget = settings.recycle.kv_store_budget
    with KVStore.open(folder, identity, budget) as store:
        wanted = nodes_to_keep(planned.plan, sequences, least, budget // kv.bytes_per_token)
        wanted &= store.is_writer
        connector = StoreConnector(store, PlannedPrompts(planned), wanted, least)
        try:
            yield connector
        finally:
            connector.close()
        observer.say(
            f"KV store: {engine.counters.loaded_tokens} prompt tokens loaded, "
            f"{store.stats.puts} prefixes kept; loading pays from {least} tokens on"
        )


def expected_hits(planned: PlannedJob) -> dict[str, Any] | None:
    """What a run would load: `tokens` of the plan's unique ones, `break_even_tokens` (None: loading
    never pays). None where there is no store. Raises UsageError."""
    settings, shape = planned.job.settings, planned.job.shape
    folder = settings.recycle.kv_store
    if folder is None or shape is None:
        return None
    from pipeline.kvstore.store import KVStore

    dtype = shape.dtype if settings.model.dtype == "auto" else settings.model.dtype
    job = planned.job
    identity = kv_identity(settings, job.model_identity, job.tokenizer.fingerprint, dtype)
    least = least_depth(job, identity, shape.kv_bytes_per_token(dtype))
    tokens = 0
    if least is not None and folder.is_dir():
        with KVStore.open(folder, identity, settings.recycle.kv_store_budget) as store:
            tokens = _count_stored(planned, store, least)
    return {"tokens": tokens, "break_even_tokens": least}


def _count_stored(planned: PlannedJob, store: KVStore, least: int) -> int:
    """Unique tokens of the plan that the store has, in prefixes of at least `least`."""
    plan, tree, prompts = planned.plan, planned.plan.tree, PlannedPrompts(planned)
    needed = plan.sequence_hi > plan.sequence_lo
    ends = np.zeros(tree.num_nodes, np.int64)
    tokens = 0
    for node in np.flatnonzero(needed).tolist():  # parents first
        above, start, end = int(tree.parent[node]), int(tree.start[node]), int(tree.end[node])
        if above >= 0 and ends[above] < start:
            continue
        sequence = int(plan.sequence_lo[node])
        ids, tenant = prompts.ids(sequence)[:end], prompts.tenant(sequence)
        ends[node] = store.match(ids, tenant).length
        if ends[node] >= least:
            tokens += max(0, int(ends[node]) - start)
    return tokens


def least_depth(job: Job, identity: Identity, bytes_per_token: int) -> int | None:
    """The break-even depth in tokens by what was measured here; None: loading never pays.

    1 on a machine that has not run the model yet.
    """
    from pipeline.kvstore.break_even import break_even_tokens, measure_load_cost

    settings = job.settings
    rates = recall_rates(settings.model, job.model_identity)
    assert settings.recycle.kv_store is not None
    if rates is None:
        return 1
    try:
        cost = measure_load_cost(settings.recycle.kv_store.absolute(), identity)
    except (OSError, UsageError):
        return 1  # the store says itself what is wrong with its folder
    return break_even_tokens(cost, bytes_per_token, rates.prefill_tokens_per_s)
