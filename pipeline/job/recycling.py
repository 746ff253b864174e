"""A job and the KV store of earlier ones: what it loads, what it leaves behind.

Which prefixes are worth keeping and loading; `kvstore/connector.py` does it while the engine runs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UsageError
from pipeline.job.job import Job
from pipeline.job.notes import RunNotes
from pipeline.job.planning import PlannedJob
from pipeline.model.identity import describe_versions
from pipeline.model.machine import cpu_description
from pipeline.model.rates import recall_rates
from pipeline.plan.plan import Plan
from pipeline.settings import JobSettings

if TYPE_CHECKING:
    from pipeline.engine.base import Engine
    from pipeline.engine.kv_connector import KVConnector
    from pipeline.kvstore.identity import Identity
    from pipeline.kvstore.store import KVStore


def parts_to_keep(
    plan: Plan, sequences: NDArray[np.int64], least: int, room: int
) -> NDArray[np.bool_]:
    """[parts] whether the KV of a part of the layout is worth keeping for the jobs of other nights.

    Those that most of `sequences` need, at least two of them unless it is of a document, until
    `room` tokens are full; of these the paths down to a depth of at least `least` tokens, where
    loading beats computing.
    """
    documents = plan.documents
    tree, fewest = (plan.tree, 2) if documents is None else (documents.tree, 1)
    below = plan.count_below(sequences) if documents is None else documents.count_needs(sequences)
    order = np.lexsort((tree.end, -below))  # parents first: no child is shared by more
    order = order[below[order] >= fewest]
    fits = np.cumsum(tree.edge_lengths[order]) <= room
    kept = np.zeros(tree.num_nodes, bool)
    kept[order[: len(order) if fits.all() else int(np.argmin(fits))]] = True
    leads_deep = np.zeros(tree.num_nodes, bool)
    nodes = np.flatnonzero(kept & (tree.end >= least))
    while len(nodes):
        leads_deep[nodes] = True
        above = np.unique(tree.parent[nodes])
        nodes = above[(above >= 0) & ~leads_deep[above]]
    return kept & leads_deep


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


def _of_states(job: Job) -> dict[str, Any]:
    """The model, and what else the states of a document depend on."""
    if job.adapter is None or job.adapter.card.mode != "packet":
        return job.model_identity
    return job.model_identity | {"adapter": job.adapter.digest}


@contextmanager
def recycling(
    engine: Engine, planned: PlannedJob, sequences: NDArray[np.int64], notes: RunNotes
) -> Iterator[KVConnector | None]:
    """States for the engine to load from `--kv-store`, and to keep there for later runs.

    None, and noted why, where the engine has no KV of its own or loading would not
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
        notes.add(f"--kv-store is left out: {who} keeps no KV of prefixes", is_warning=True)
        yield None
        return
    from pipeline.kvstore.connector import StoreConnector
    from pipeline.kvstore.store import KVStore

    job = planned.job
    identity = kv_identity(settings, _of_states(job), job.tokenizer.fingerprint, kv.dtype)
    least = least_depth(job, identity, kv.bytes_per_token)
    if least is None:
        notes.add("--kv-store is left out: here computing a prefix is faster than loading it")
        yield None
        return
    budget = settings.recycle.kv_store_budget
    with KVStore.open(folder, identity, budget) as store:
        wanted = parts_to_keep(planned.plan, sequences, least, budget // kv.bytes_per_token)
        wanted &= store.is_writer
        connector = StoreConnector(store, planned.tenant, wanted, least)
        try:
            yield connector
        finally:
            connector.close()
        notes.add(
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
    identity = kv_identity(settings, _of_states(job), job.tokenizer.fingerprint, dtype)
    least = least_depth(job, identity, shape.kv_bytes_per_token(dtype))
    tokens = 0
    if least is not None and folder.is_dir():
        with KVStore.open(folder, identity, settings.recycle.kv_store_budget) as store:
            tokens = _count_stored(planned, store, least)
    return {"tokens": tokens, "break_even_tokens": least}


def _count_stored(planned: PlannedJob, store: KVStore, least: int) -> int:
    """Tokens that the plan encodes once and the store has, in prefixes of at least `least`."""
    plan = planned.plan
    every = np.arange(len(plan.sequences))
    if plan.documents is None:
        tree, table, first = plan.tree, plan.table, plan.sequence_lo
        is_needed = plan.sequence_hi > plan.sequence_lo
    else:
        tree, table = plan.documents.tree, plan.documents.paths
        users, bounds = plan.documents.users(every)
        is_needed = np.diff(bounds) > 0
        first = users[np.minimum(bounds[:-1], len(users) - 1)]
    ends = np.zeros(tree.num_nodes, np.int64)
    tokens = 0
    for node in np.flatnonzero(is_needed).tolist():  # parents first
        above, start, end = int(tree.parent[node]), int(tree.start[node]), int(tree.end[node])
        if above >= 0 and ends[above] < start:
            continue
        ids = table[int(tree.row_of_prompt[tree.prompt_lo[node]])][:end].astype(np.uint32)
        ends[node] = store.match(ids, planned.tenant(int(first[node])))
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
