"""One audited row: does plain full prefill say what the product said? Knows no files and no text.

Teacher forcing proves it by induction: if the baseline, given the prompt and our first i tokens,
says our token i for every i, then the baseline alone would have written the same answer. After the
first difference the two contexts differ, so nothing further down the row is looked at.

How a row is classed by its first difference:

```
            identical   near_tie                  drift               corrupt
 deficit  |     0     | ... near-tie bar ]  ... hard bar (0.5) ]  beyond, or NaN, or a wrong end
```

The bars are in nats. A sampled row's deficit is probability mass, so its bars are converted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from pipeline.engine.base import Baseline, Replay, RunControl, StopCheck
from pipeline.engine.ends import ends_by_text, ends_by_token
from pipeline.records import FinishReason, SamplingParams

if TYPE_CHECKING:
    from pipeline.engine.verify.story import Story

Tier = Literal["strict", "exact", "16-bit", "int8"]
RowClass = Literal["identical", "near_tie", "drift", "corrupt"]
ROW_CLASSES: Final[tuple[RowClass, ...]] = ("identical", "near_tie", "drift", "corrupt")


@dataclass(frozen=True, slots=True)
class Bars:
    """How far the baseline may prefer another token than the product's; nats, of a greedy row."""

    near_tie: float
    hard: float = 0.5

    def for_params(self, params: SamplingParams) -> Bars:
        """These bars in the unit of the row's deficits (see `Replay`).

        A sampled row's are probability mass. Logits that are off so far that two of them change
        their distance by b multiply the odds of any cut through the distribution by e^(b/T) at
        most, which moves the mass below the cut by at most tanh(b / 4T).
        """
        if params.is_greedy:
            return self
        scale = 4 * params.temperature
        return Bars(math.tanh(self.near_tie / scale), math.tanh(self.hard / scale))


BARS: Final[dict[Tier, Bars]] = {
    "strict": Bars(near_tie=1e-3),  # against another program; against itself see `audit.arms`
    "exact": Bars(near_tie=1e-3),
    "16-bit": Bars(near_tie=0.125),
    "int8": Bars(near_tie=0.125),
}


@dataclass(frozen=True, slots=True)
class AuditInput:
    """One written row as token ids. `output` excludes nothing: a generated EOS is its last id.

    `is_stopped` says whether the text of some generated ids holds one of `params.stop`; `lengths`
    are those of the prompt's segments, where it has any; `story` of the conversation up to this
    turn, where some of it was given up; `over_at`: after so many tokens the answer is complete by
    its constraint.
    """

    row_index: int
    prompt: Sequence[int]
    output: Sequence[int]
    params: SamplingParams
    finish_reason: FinishReason
    noise_key: int = 0
    eos_token_ids: frozenset[int] = frozenset()
    is_stopped: StopCheck = field(default=RunControl.is_stopped, repr=False)
    lengths: tuple[int, ...] = ()
    story: Story | None = None
    over_at: int | None = None


@dataclass(frozen=True, slots=True)
class FreeRun:
    """What the baseline wrote on its own. `explained`: the difference, if any, is a near-tie."""

    token_ids: tuple[int, ...]
    first_divergence: int | None
    explained: bool


@dataclass(frozen=True, slots=True)
class RowAudit:
    """What the audit says of one row.

    `first_divergence`: output position, None if there is none (`len(output)`: it ended too early).
    `margin`, `deficit`: of the baseline there, as in `Replay`; None without a divergence and for a
    wrong end. `baseline_ids`: what the baseline said, position by position given our tokens.
    `edit_similarity`: 1 where the baseline's own text, as far as known, has the same tokens.
    """

    row_index: int
    row_class: RowClass
    first_divergence: int | None
    margin: float | None
    deficit: float | None
    tokens_checked: int
    baseline_ids: tuple[int, ...]
    edit_similarity: float
    free_run: FreeRun | None = None

    @property
    def exact(self) -> bool:
        """Whether the baseline gave the same tokens and the same end."""
        return self.row_class == "identical"


def audit_row(baseline: Baseline, row: AuditInput, bars: Bars, free_run: bool = False) -> RowAudit:
    """Replay one row; with `free_run` and a greedy row, let the baseline write it alone as well."""
    bars = bars.for_params(row.params)
    replay = baseline.replay(row.prompt, row.output, row.params, row.noise_key)
    output = np.asarray(row.output, np.int64)
    # A baseline that cannot tell its own scores (NaN) agrees with nothing, not even by chance.
    different = np.flatnonzero((replay.predicted != output) | np.isnan(replay.deficit))
    divergence = int(different[0]) if len(different) else None
    margin = None if divergence is None else float(replay.margin[divergence])
    deficit = None if divergence is None else float(replay.deficit[divergence])
    row_class = _classify(deficit, bars)
    wrong_end = find_wrong_end(row)
    if wrong_end is not None:
        row_class = "corrupt"
        if divergence is None or wrong_end < divergence:
            divergence, margin, deficit = wrong_end, None, None
    runs_free = free_run and row.params.is_greedy
    alone = _run_free(baseline, row, replay, bars) if runs_free else None
    theirs = tuple(replay.predicted.tolist()) if alone is None else alone.token_ids
    return RowAudit(
        row_index=row.row_index,
        row_class=row_class,
        first_divergence=divergence,
        margin=margin,
        deficit=deficit,
        tokens_checked=len(output) if divergence is None else min(divergence + 1, len(output)),
        baseline_ids=tuple(replay.predicted.tolist()),
        edit_similarity=SequenceMatcher(None, row.output, theirs, autojunk=False).ratio(),
        free_run=alone,
    )


def find_wrong_end(row: AuditInput) -> int | None:
    """The output position where the row should have ended or gone on, None if its end is right.

    An answer ends after its first EOS (unless ignored) or stop token, with the token that completes
    a stop string or what it must be, or at `max_new_tokens`; that is called "length", all else
    "stop".
    """
    length, params = len(row.output), row.params
    lasts = (ends_by_token(token, params, row.eos_token_ids) for token in row.output)
    after_eos = next((i + 1 for i, is_last in enumerate(lasts) if is_last), None)
    ends = [end for end in (params.max_new_tokens, after_eos, row.over_at) if end is not None]
    if min(ends) < length:
        return min(ends)
    if ends_by_text(row.is_stopped, row.output[:-1], params, row.prompt):
        return length - 1
    stopped = length in (after_eos, row.over_at) or ends_by_text(
        row.is_stopped, row.output, params, row.prompt
    )
    if row.finish_reason == "stop":
        return None if stopped else length
    return length if stopped or length < params.max_new_tokens else None


def _classify(deficit: float | None, bars: Bars) -> RowClass:
    if deficit is None:
        return "identical"
    if deficit <= bars.near_tie:
        return "near_tie"
    return "drift" if deficit <= bars.hard else "corrupt"  # NaN compares false: corrupt


def _run_free(baseline: Baseline, row: AuditInput, replay: Replay, bars: Bars) -> FreeRun:
    """Plain generation against our ids, token by token."""
    alone = baseline.generate_one(row.prompt, row.params)
    output = tuple(row.output)
    if row.params.stop and row.finish_reason == "stop":  # which the baseline does not see
        alone = alone[: len(output)]
    common = min(len(alone), len(output))
    differing = (i for i in range(common) if alone[i] != output[i])
    divergence = next(differing, None if len(alone) == len(output) else common)
    explained = divergence is None or (
        divergence < common and bool(replay.margin[divergence] <= bars.near_tie)
    )
    return FreeRun(alone, divergence, explained)
