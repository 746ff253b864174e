"""The audited rows, one after the other through what they are judged by; and which ones can be."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import polars as pl

from pipeline.audit.replay import BARS, AuditInput, RowAudit, Tier, audit_row
from pipeline.engine.base import Baseline, EngineCapabilities
from pipeline.errors import UsageError
from pipeline.job.observer import Observer
from pipeline.settings import AuditSettings

_SAY_EVERY_S = 30.0


def replayable(
    ran: EngineCapabilities, chosen: pl.DataFrame, inputs: list[AuditInput], observer: Observer
) -> tuple[pl.DataFrame, list[AuditInput]]:
    """Those rows whose answer follows from prompt and parameters alone. Raises UsageError."""
    if ran.replays_noise:
        return chosen, inputs
    greedy = [row for row in inputs if row.params.is_greedy]
    if inputs and not greedy:
        raise UsageError(
            "the engine drew every audited answer with noise of its own, which nothing can replay; "
            "run some rows with temperature 0 to have something to compare"
        )
    if len(greedy) < len(inputs):
        left_out = len(inputs) - len(greedy)
        observer.say(f"{left_out} of them are left out: the engine drew them with noise of its own")
    return chosen.filter(pl.col("row_index").is_in([row.row_index for row in greedy])), greedy


def free_rows(inputs: list[AuditInput], settings: AuditSettings, seed: int) -> set[int]:
    """Positions of the greedy rows that the baseline generates on its own as well."""
    greedy = [i for i, row in enumerate(inputs) if row.params.is_greedy]
    shuffled = np.random.default_rng(seed).permutation(greedy)
    return set(shuffled[: settings.audit_free_running].tolist())


def replay_rows(
    judge: Callable[[AuditInput], Baseline],
    inputs: list[AuditInput],
    tier: Tier,
    free: set[int],
    observer: Observer,
) -> list[RowAudit]:
    """Each row by what it is judged by; those at the positions `free` are also written anew."""
    audits = []
    said_at = time.monotonic()
    for index, row in enumerate(inputs):
        audits.append(audit_row(judge(row), row, BARS[tier], free_run=index in free))
        if time.monotonic() - said_at > _SAY_EVERY_S:
            said_at = time.monotonic()
            observer.say(f"{index + 1}/{len(inputs)} rows audited")
    return audits
