"""The texts of audited answers beside those of the baseline. Describes, and decides nothing."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.audit.replay import AuditInput, RowAudit
from pipeline.audit.similarity import Encoder
from pipeline.job.answer_texts import Said
from pipeline.job.job import Job


def cosine_of_rows(
    job: Job,
    encoder: Encoder | None,
    texts: Sequence[str],
    inputs: Sequence[AuditInput],
    audits: Sequence[RowAudit],
) -> dict[int, float]:
    """Of our text and the baseline's, of its free run if there is one, by `row_index`."""
    if encoder is None or not audits:
        return {}
    ids = [a.baseline_ids if a.free_run is None else a.free_run.token_ids for a in audits]
    said = [  # "stop": a last token that is an end is what ended it
        Said(row.prompt, tuple(own), "stop", row.params)
        for row, own in zip(inputs, ids, strict=True)
    ]
    cosines = encoder.cosine(texts, [parts.text for parts in job.decode(said)])
    return {a.row_index: float(c) for a, c in zip(audits, cosines, strict=True)}
