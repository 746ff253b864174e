"""What became of a sequence, as the record that leaves the engine. Knows no tensors."""

from __future__ import annotations

import math
from dataclasses import replace

from pipeline.engine.live import LiveRow
from pipeline.engine.spans import SharedSpan
from pipeline.plan.failed_turns import fail_later
from pipeline.plan.plan import Plan
from pipeline.records import Completion, FinishReason, Scored, Timing


def complete(row: LiveRow, reason: FinishReason, now_s: float) -> Completion:
    """A row that ended `now_s` seconds after the engine started; its logits failed for "error"."""
    failed = reason == "error"
    error_type = "NonFiniteLogits" if row.fault is None else "ConstraintFault"
    message = row.fault or "the model gave no finite logits"
    message = f"{message} at output token {len(row.token_ids)}"
    return Completion(
        sequence=row.sequence,
        token_ids=() if failed else tuple(row.token_ids),
        finish_reason=reason,
        cached_tokens=row.cached_tokens,
        timing=_timing(row, now_s),
        error_type=error_type if failed else None,
        error_message=message if failed else None,
        stored_tokens=sum(span.stored_tokens for span in (row.place.span, *_first_needed(row))),
        forced_tokens=0 if failed else row.forced_tokens,
        logprobs=() if failed else tuple(row.logprobs),
    )


def complete_scored(row: LiveRow, scores: tuple[Scored, ...], now_s: float) -> Completion:
    """A row whose requests have `scores`; it failed where some logits were no numbers."""
    return with_scores(complete(row, "length", now_s), scores)


def with_scores(done: Completion, scores: tuple[Scored, ...]) -> Completion:
    """The same with scores; it failed where some logits were no numbers."""
    if not any(math.isnan(logprob) for scored in scores for logprob in scored.logprobs):
        return replace(done, scores=scores)
    return replace(
        done,
        finish_reason="error",
        error_type="NonFiniteLogits",
        error_message="the model gave no finite logits at a token that is scored",
    )


def fail(row: LiveRow, message: str, now_s: float) -> Completion:
    """A row for which not even the smallest step found memory."""
    return Completion(
        row.sequence, (), "error", row.cached_tokens, _timing(row, now_s), "OutOfMemory", message
    )


def fail_turn(sequence: int, turn: int, error_type: str, message: str, now_s: float) -> Completion:
    """A turn of a conversation that cannot run."""
    timing = Timing(queue_s=now_s)
    return Completion(sequence, (), "error", 0, timing, error_type, message, turn=turn)


def refuse(plan: Plan, sequence: int, budget: int, now_s: float) -> list[Completion]:
    """A sequence whose KV does not fit `budget` bytes becomes an error, never the job; so does each
    later turn of a conversation."""
    message = (
        f"{int(plan.prompt_lengths[sequence])} prompt tokens and up to "
        f"{int(plan.max_new_tokens[sequence])} new ones need more KV than the budget of {budget} "
        "bytes; raise --kv-budget"
    )
    timing = Timing(queue_s=now_s)
    refused = Completion(sequence, (), "error", 0, timing, "KVBudgetExceeded", message)
    return [refused, *fail_later(plan, sequence, 0, now_s)]


def _timing(row: LiveRow, now_s: float) -> Timing:
    """See the picture in `records`. A shared span's time is divided among the sequences below."""
    shared = sum(span.prefill_s / span.num_sequences for span in _first_needed(row))
    return Timing(
        queue_s=row.admitted_s,
        prefill_s=row.place.span.prefill_s,
        prefill_amortized_s=shared,
        decode_s=now_s - row.first_token_s,
        ttft_s=row.first_token_s,
        latency_s=now_s,
    )


def _first_needed(row: LiveRow) -> list[SharedSpan]:
    """The shared spans that it stands below, which count for a conversation's first turn alone."""
    if row.conversation is not None and row.conversation.number:
        return []
    return [needed.span for needed in row.place.needs]
