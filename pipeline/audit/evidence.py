"""What the audit's other arms showed, and when it counts against a run. Pure arithmetic.

1. `again`: the baseline agrees with itself, or nothing can be judged by it.
2. `product` against `batched` (16-bit only; fp32 has a stricter rule in `verdict`): reuse must not
   change more rows than batching alone does. Rows in which only one of the two differs decide, by
   a one-sided sign test.
3. strict mode: every row has the bits that it has when the same engine runs it alone.
4. planted faults: those that changed an answer are caught. In 16 bits a changed answer can be a
   near-tie, which the audit lets pass by its own rule: there one of them has to be caught.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np

from pipeline.audit.logprobs import LogprobCheck
from pipeline.audit.replay import Tier
from pipeline.engine.base import Deviation

_SIGNIFICANT: Final = 0.01
_HIGH_QUANTILE: Final = 0.999


@dataclass(frozen=True)
class ArmSummary:
    """One arm against the baseline. `differing`: by row, whether any token would be another one.

    `kl_mean`, `kl_max` (nats) and `same_choice` (share) are over all positions; `gap_p999` is the
    99.9 % quantile of how far the distance of the baseline's two best tokens moves, nats.
    """

    differing: tuple[bool, ...]
    positions: int
    same_choice: float
    kl_mean: float
    kl_max: float
    gap_p999: float

    @classmethod
    def of(cls, rows: Sequence[Deviation]) -> ArmSummary:
        """From at least one row."""
        differs, kl, gap = (np.concatenate(parts) for parts in zip(*rows, strict=True))
        return cls(
            tuple(bool(row.differs.any()) for row in rows),
            len(kl),
            float(1.0 - differs.mean()),
            float(kl.mean()),
            float(kl.max()),
            float(np.quantile(gap, _HIGH_QUANTILE)),
        )

    def to_json(self) -> dict[str, Any]:
        """A mapping of plain values; NaN is None."""
        values = asdict(self) | {
            "rows": len(self.differing),
            "rows_exact": len(self.differing) - sum(self.differing),
        }
        del values["differing"]
        return {name: None if value != value else value for name, value in values.items()}


@dataclass(frozen=True)
class PlantedFault:
    """A fault at prompt position `at` (0: everywhere): did it change an answer, and did the audit
    notice?"""

    fault: str
    at: int
    changed: bool
    caught: bool


@dataclass(frozen=True)
class Evidence:
    """All arms of one audit; empty where only the replay was asked for.

    `same_bits`: by row, of strict mode only. `weights`: of int8 weights only, the model with them
    against the one that was saved; `attention`: where documents are reused at any position or
    conversations give up tokens, that against full attention. The user asked for both, so they are
    told and never judged. `by_age`: the second of these by how many turns ago the newest token was
    that went. `logprobs`: where rows ask for them.
    """

    arms: Mapping[str, ArmSummary] = field(default_factory=dict)
    faults: Sequence[PlantedFault] = ()
    same_bits: Sequence[bool] = ()
    weights: ArmSummary | None = None
    attention: ArmSummary | None = None
    by_age: Mapping[int, ArmSummary] = field(default_factory=dict)
    logprobs: LogprobCheck | None = None

    @property
    def faults_changed(self) -> int:
        """Planted faults that changed an answer: the others did no harm."""
        return sum(fault.changed for fault in self.faults)

    @property
    def faults_caught(self) -> int:
        """Those of them that the audit noticed."""
        return sum(fault.changed and fault.caught for fault in self.faults)

    def failures(self, tier: Tier) -> list[str]:
        """Why the run, or the audit itself, cannot be trusted; one sentence each."""
        found = []
        if "again" in self.arms and any(self.arms["again"].differing):
            found.append("the baseline does not agree with itself, so nothing can be judged by it")
        wrong = None if self.logprobs is None else self.logprobs.failure(tier)
        if wrong is not None:
            found.append(wrong)
        if not all(self.same_bits):
            found.append(
                f"reuse or batching changed the bits of {self.same_bits.count(False)} of "
                f"{len(self.same_bits)} rows, which strict mode rules out"
            )
        is_rounded = tier in ("16-bit", "int8")
        needed = min(1, self.faults_changed) if is_rounded else self.faults_changed
        if self.faults_caught < needed:
            found.append(
                f"the audit caught {self.faults_caught} of {self.faults_changed} planted faults "
                "that changed an answer"
            )
        if is_rounded and {"batched", "product"} <= self.arms.keys():
            only_product, only_batched = self._discordant()
            if sign_test(only_product, only_batched) < _SIGNIFICANT:
                found.append(
                    f"reuse changes {only_product} rows that batching alone does not, and "
                    f"{only_batched} the other way round"
                )
        return found

    def _discordant(self) -> tuple[int, int]:
        pairs = zip(self.arms["product"].differing, self.arms["batched"].differing, strict=True)
        either = [pair for pair in pairs if pair[0] != pair[1]]
        return sum(product for product, _ in either), sum(batched for _, batched in either)

    def to_json(self) -> dict[str, Any]:
        return {
            "strict": {"rows": len(self.same_bits), "rows_same_bits": sum(self.same_bits)},
            "arms": {name: arm.to_json() for name, arm in self.arms.items()},
            "weights": self.weights and self.weights.to_json(),
            "attention": self.attention and self.attention.to_json(),
            "logprobs": self.logprobs and self.logprobs.to_json(),
            "attention_by_age": [
                {"turns_ago": age} | arm.to_json() for age, arm in sorted(self.by_age.items())
            ],
            "faults": {
                "planted": len(self.faults),
                "changed_an_answer": self.faults_changed,
                "caught": self.faults_caught,
                "each": [asdict(fault) for fault in self.faults],
            },
        }


NO_EVIDENCE: Final = Evidence()


def sign_test(more: int, less: int) -> float:
    """One-sided: the probability of at least `more` heads in `more + less` throws of a coin."""
    throws = more + less
    ways = sum(math.comb(throws, heads) for heads in range(more, throws + 1))
    return float(ways / 2**throws)
