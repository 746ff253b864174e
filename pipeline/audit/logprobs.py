"""Written log-probabilities against those of what judges the tokens. Knows no files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pipeline.audit.replay import BARS, AuditInput, Tier

if TYPE_CHECKING:
    from pipeline.audit.baselines import RowBaseline

Said = Sequence[Mapping[str, Any]]
"""The column `logprobs` of a row."""


@dataclass(frozen=True)
class LogprobCheck:
    """How far the log-probability of a chosen token is from the baseline's at worst, in nats;
    infinity where a row has not one for each of its tokens."""

    rows: int
    positions: int
    max_deviation: float

    def failure(self, tier: Tier) -> str | None:
        """Why they cannot be trusted. Of 16 bits, or rounded weights, a logit is known to a few
        tenths only."""
        bars = BARS[tier]
        bar = bars.hard if tier in ("16-bit", "int8") else bars.near_tie
        if self.max_deviation <= bar:  # NaN is not
            return None
        return (
            f"a log-probability is {self.max_deviation:.2g} nats from the baseline's, and {bar:g} "
            "are allowed"
        )

    def to_json(self) -> dict[str, Any]:
        """A mapping of plain values; what is no number is None."""
        is_number = abs(self.max_deviation) < float("inf")
        return asdict(self) | {"max_deviation": self.max_deviation if is_number else None}


def check_logprobs(
    judge: Callable[[AuditInput], RowBaseline], rows: Sequence[tuple[AuditInput, Said | None]]
) -> LogprobCheck | None:
    """Of the rows that have some, by what their tokens are judged by; None: no row has."""
    from pipeline.engine.logprobs import read_logprobs

    asked = [(row, said) for row, said in rows if said is not None]
    worst, positions = 0.0, 0
    for row, said in asked:
        if [token["token_id"] for token in said] != list(row.output):
            return LogprobCheck(len(asked), positions, float("inf"))
        logits = judge(row).forced_logits(row.prompt, row.output)
        truth = read_logprobs(logits, row.output, [0] * len(row.output))
        for token, expected in zip(said, truth, strict=True):
            deviation = abs(token["logprob"] - expected.logprob)
            worst = deviation if not deviation <= worst else worst  # NaN stays
        positions += len(said)
    return LogprobCheck(len(asked), positions, worst) if asked else None
