"""What a run directory says of its plan and of its audit, in one small file each."""

from __future__ import annotations

from typing import Annotated, Final, Literal, NotRequired, get_args

from pydantic import AfterValidator, Field
from typing_extensions import TypedDict

from pipeline.storage.json_file import Count, Digits, JsonFile, Number

Cosine = Annotated[float, Field(allow_inf_nan=False)]
_ArmName = Literal["again", "batched", "reuse", "product"]


class _Estimate(TypedDict):
    prefill_s: Number
    decode_s: Number


class _Documents(TypedDict):
    mode: str


class _Plan(TypedDict):
    plan_hash: Digits
    rows: Count
    rows_rejected: Count
    prompt_tokens: Count
    unique_tokens: Count
    saving: Number
    groups: NotRequired[Count]
    max_new_tokens: NotRequired[Count]
    peak_kv_bytes: NotRequired[Count | None]
    kv_budget_bytes: NotRequired[Count | None]
    estimate: NotRequired[_Estimate | None]
    documents: NotRequired[_Documents | None]


class _Classes(TypedDict):
    identical: Count
    near_tie: Count
    drift: Count
    corrupt: Count


class _FreeRunning(TypedDict):
    rows: Count
    exact: Count
    unexplained: Count


class _Similarity(TypedDict):
    encoder: str | None
    mean: Cosine
    min: Cosine


class _NoSimilarity(TypedDict):
    encoder: str | None
    mean: None
    min: None


class _Strict(TypedDict):
    rows: Count
    rows_same_bits: Count


class _Faults(TypedDict):
    planted: Count
    changed_an_answer: Count
    caught: Count


class _Arm(TypedDict):
    rows: Count
    rows_exact: Count
    kl_max: Number | None
    gap_p999: Number | None


class _Weights(_Arm):
    kl_mean: Number | None
    same_choice: Number


def _all_or_none(arms: dict[str, _Arm]) -> dict[str, _Arm]:
    if arms and len(arms) < len(get_args(_ArmName)):
        raise ValueError("an arm is missing")
    return arms


class _Bar(TypedDict):
    audit_sample: str
    audit_min_exact: Number
    audit_free_running: Count
    audit_arms: Count


class _Audit(TypedDict):
    verdict: Literal["pass", "fail"]
    reasons: list[str]
    tier: str
    rows_audited: Count
    rows_exact: Count
    bound_95: Number
    classes: _Classes
    groups_total: Count
    groups_covered: Count
    free_running: _FreeRunning
    similarity: _Similarity | _NoSimilarity
    near_tie_bar: Number
    hard_bar: Number
    tokens_checked: Count
    strict: _Strict
    arms: Annotated[dict[_ArmName, _Arm], AfterValidator(_all_or_none)]
    weights: NotRequired[_Weights | None]  # of int8 weights only
    faults: _Faults
    seed: Count
    bar: NotRequired[_Bar]  # of what it was asked to show; older audits do not say it
    rows_auditable: NotRequired[Count]
    rows_left_out: NotRequired[Count]


PLAN_SUMMARY: Final = JsonFile(
    _Plan, "plan/summary.json", "delete it and run the same command again, which makes it anew"
)
AUDIT_AGAIN: Final = "audit the run again by coppice audit"
AUDIT_SUMMARY: Final = JsonFile(_Audit, "audit/summary.json", AUDIT_AGAIN)
