"""What other arms count for: a wavering baseline, faults that pass, reuse that changes more."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from pipeline.audit.evidence import NO_EVIDENCE, ArmSummary, Evidence, PlantedFault, sign_test
from pipeline.engine.base import Deviation


def arm(*differing: bool) -> ArmSummary:
    return ArmSummary(differing, 8, 1.0, 1e-9, 2e-9, 1e-4)


CLEAN = Evidence({name: arm(*[False] * 12) for name in ("again", "batched", "reuse", "product")})


def test_a_summary_is_over_all_positions_of_all_rows() -> None:
    one = Deviation(np.array([False, True]), np.array([0.0, 0.3]), np.array([0.0, 0.2]))
    two = Deviation(np.array([False, False]), np.array([0.1, 0.0]), np.array([0.1, 0.1]))
    summary = ArmSummary.of([one, two])
    assert summary.differing == (True, False) and summary.same_choice == 0.75
    assert summary.kl_mean == pytest.approx(0.1) and summary.kl_max == 0.3
    assert 0.19 < summary.gap_p999 < 0.2
    found = summary.to_json()
    assert (found["rows"], found["rows_exact"], found["positions"]) == (2, 1, 4)


def test_nan_is_no_json() -> None:
    nan = np.array([np.nan])
    found = ArmSummary.of([Deviation(np.array([True]), nan, nan)]).to_json()
    assert found["kl_max"] is None and json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("tier", ["exact", "16-bit"])
def test_clean_arms_say_nothing(tier: str) -> None:
    assert CLEAN.failures(tier) == NO_EVIDENCE.failures(tier) == []  # type: ignore[arg-type]


def test_a_baseline_that_wavers_judges_nothing() -> None:
    wavering = replace(CLEAN, arms={**CLEAN.arms, "again": arm(False, True)})
    assert "does not agree with itself" in wavering.failures("exact")[0]


@pytest.mark.parametrize(
    ("caught", "tier", "passes"),
    [
        ([True, True], "exact", True),
        ([True, False], "exact", False),
        ([True, False], "16-bit", True),
        ([False, False], "16-bit", False),
    ],
)
def test_faults_that_changed_an_answer_must_be_caught(
    caught: list[bool], tier: str, passes: bool
) -> None:
    faults = [PlantedFault("position", at, True, found) for at, found in enumerate(caught)]
    harmless = PlantedFault("bit flip", 3, False, False)
    evidence = replace(CLEAN, faults=[*faults, harmless])
    assert (evidence.failures(tier) == []) == passes  # type: ignore[arg-type]
    said = evidence.to_json()["faults"]
    assert (said["planted"], said["changed_an_answer"], said["caught"]) == (3, 2, sum(caught))


def test_reuse_may_not_change_more_rows_than_batching_does() -> None:
    """Twelve rows: seven against none is beyond one in a hundred, six is not."""
    for changed, passes in ((6, True), (7, False)):
        product = arm(*[place < changed for place in range(12)])
        evidence = replace(CLEAN, arms={**CLEAN.arms, "product": product})
        assert (evidence.failures("16-bit") == []) == passes
        assert evidence.failures("exact") == []  # its own rule is stricter
        both = replace(evidence, arms={**evidence.arms, "batched": product})
        assert both.failures("16-bit") == []


def test_strict_mode_has_no_exceptions() -> None:
    assert replace(CLEAN, same_bits=[True] * 9).failures("strict") == []
    changed = replace(CLEAN, same_bits=[True] * 9 + [False])
    assert "changed the bits of 1 of 10 rows" in changed.failures("strict")[0]


@pytest.mark.parametrize(
    ("more", "less", "chance"), [(0, 0, 1.0), (1, 0, 0.5), (7, 0, 1 / 128), (2, 1, 0.5)]
)
def test_the_sign_test_is_a_coin(more: int, less: int, chance: float) -> None:
    assert sign_test(more, less) == chance
