"""Whether documents are reused as was asked: measured on rows of the job, decided before the first.

```
 planned job ─► rows of every kind ─► both ways (engine) ─► agreement ─► decision ─► run.json
```

What was decided holds for the whole job: a resumed one reads it, and measures nothing again. Only
an aborted job, none of whose rows are written, is judged anew, by the bars of the new call.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.engine.base import Engine, RunControl
from pipeline.errors import DocumentsDisagree
from pipeline.job.agreement import (
    Agreement,
    ComparedRow,
    by_documents,
    describe_calibration,
    objections,
)
from pipeline.job.observer import Observer
from pipeline.job.planning import PlannedJob, without_documents
from pipeline.reuse_settings import ReuseSettings
from pipeline.storage.run_directory import RunDirectory

Decision = Literal["reuse", "fallback", "abort", "warn", "skipped"]
_SEED: Final = 0


@dataclass(frozen=True)
class Calibration:
    """What run.json keeps. `reasons`: why documents should not be reused, if so; `agreement`,
    `by_documents`: of the rows that were computed both ways, as JSON has it."""

    mode: str
    asked_rows: int
    decision: Decision
    reasons: list[str]
    agreement: dict[str, Any]
    by_documents: list[dict[str, Any]]
    cost: dict[str, Any]

    def __str__(self) -> str:
        return f"--reuse {self.mode}: {describe_calibration(asdict(self))}"

    def check(self) -> None:
        """Raises DocumentsDisagree where the job was to end."""
        if self.decision == "abort":
            raise DocumentsDisagree(
                f"{self}; choose another --reuse, other bars or --on-disagreement fallback"
            )

    def applied_to(self, planned: PlannedJob) -> PlannedJob:
        """The job as it runs after this decision."""
        if self.decision != "fallback":
            return planned
        return without_documents(planned, "; ".join(self.reasons))


def as_decided(planned: PlannedJob, directory: RunDirectory) -> PlannedJob:
    """The job as an earlier session decided that it runs; as it was planned where none did."""
    known = _read(directory)
    return planned if known is None or planned.by_prefix is None else known.applied_to(planned)


def reused_documents(directory: RunDirectory) -> bool:
    """Whether a run that was asked to reuse documents has done so."""
    known = _read(directory)
    return known is None or known.decision != "fallback"


def calibrate(
    engine: Engine,
    planned: PlannedJob,
    directory: RunDirectory,
    control: RunControl,
    observer: Observer,
) -> PlannedJob | None:
    """The job as it runs: with its documents reused as was asked, or not. None where `control`
    ended the calibration.

    Raises DocumentsDisagree where that was asked for.
    """
    if planned.by_prefix is None:
        return planned
    before = _read(directory)
    known = None if before is None else _judge_again(before, planned.job.settings.reuse)
    if known is None:
        known = _measure(engine, planned, control, observer)
    if known is None:
        return None
    if known != before:
        directory.update_manifest(calibration=asdict(known))
    known.check()
    if known != before:
        observer.say(str(known))
    return known.applied_to(planned)


def choose_rows(
    documents: NDArray[np.int64], lengths: NDArray[np.int64], count: int
) -> NDArray[np.int64]:
    """`count` rows of these, or all: each as likely as any other, evenly over numbers of documents
    and within them over lengths. Ascending, and always the same ones."""
    if count >= len(documents):
        return np.arange(len(documents))
    draw = np.random.default_rng(_SEED)
    order = np.lexsort((draw.random(len(documents)), lengths, documents))
    step = len(documents) / max(1, count)
    places = ((np.arange(count) + draw.random()) * step).astype(np.int64)
    return np.sort(order[np.minimum(places, len(documents) - 1)])


def _judge_again(known: Calibration, settings: ReuseSettings) -> Calibration | None:
    """What was decided before; an abort by today's bars, or None where other rows are asked for."""
    if known.decision != "abort":
        return known
    if known.asked_rows != settings.calibration_rows:
        return None
    names = [field.name for field in fields(Agreement)]
    agreement = Agreement(**{name: known.agreement[name] for name in names})
    decision, reasons = _decide(agreement, settings)
    return replace(known, decision=decision, reasons=reasons)


def _read(directory: RunDirectory) -> Calibration | None:
    found = directory.read_manifest().get("calibration")
    if found is None:
        return None
    return Calibration(**{field.name: found[field.name] for field in fields(Calibration)})


def _measure(
    engine: Engine, planned: PlannedJob, control: RunControl, observer: Observer
) -> Calibration | None:
    plan, settings = planned.plan, planned.job.settings.reuse
    assert plan.documents is not None and planned.by_prefix is not None
    sequences = plan.sequence_of_row[planned.rows]
    sequences = sequences[sequences >= 0]
    documents = np.diff(plan.documents.use_bounds)
    sequences = sequences[documents[sequences] > 0]
    lengths = plan.prompt_lengths[sequences]
    chosen = sequences[choose_rows(documents[sequences], lengths, settings.calibration_rows)]
    from pipeline.engine.verify.both_ways import BothWays  # brings torch

    ways = BothWays(engine, plan, planned.by_prefix, control)
    if len(chosen):
        observer.say(
            f"calibrating: {len(chosen):,} rows are computed with documents reused and in full"
        )
    differences = ways.compare(np.unique(chosen))
    if differences is None:
        return None
    rows = [
        ComparedRow(int(documents[s]), *differences[s]) for s in chosen.tolist() if s in differences
    ]
    agreement = Agreement.of(rows, len(sequences))
    decision, reasons = _decide(agreement, settings) if len(chosen) else ("skipped", [])
    return Calibration(
        settings.reuse,
        settings.calibration_rows,
        decision,
        reasons,
        asdict(agreement),
        by_documents(rows, Counter(documents[sequences].tolist())),
        asdict(ways.cost),
    )


def _decide(agreement: Agreement, settings: ReuseSettings) -> tuple[Decision, list[str]]:
    reasons = objections(agreement, settings)
    return settings.on_disagreement if reasons else "reuse", reasons
