"""What became of a sequence, as the record that leaves the engine. Knows no tensors."""

from __future__ import annotations

from pipeline.engine.live import LiveRow
from pipeline.plan.plan import Plan
from pipeline.records import Completion, FinishReason, Timing


def complete(row: LiveRow, reason: FinishReason, now_s: float) -> Completion:
    """A row that ended `now_s` seconds after the engine started; its logits failed for "error"."""
    failed = reason == "error"
    message = f"the model gave no finite logits at output token {len(row.token_ids)}"
    return Completion(
        sequence=row.sequence,
        token_ids=() if failed else tuple(row.token_ids),
        finish_reason=reason,
        cached_tokens=row.cached_tokens,
        timing=_timing(row, now_s),
        error_type="NonFiniteLogits" if failed else None,
        error_message=message if failed else None,
        stored_tokens=row.place.span.stored_tokens
        + sum(shared.span.stored_tokens for shared in row.place.needs),
    )


def fail(row: LiveRow, message: str, now_s: float) -> Completion:
    """A row for which not even the smallest step found memory."""
    return Completion(
        row.sequence, (), "error", row.cached_tokens, _timing(row, now_s), "OutOfMemory", message
    )


def refuse(plan: Plan, sequence: int, budget: int, now_s: float) -> Completion:
    """A sequence whose KV does not fit `budget` bytes becomes an error, never the job."""
    message = (
        f"{int(plan.prompt_lengths[sequence])} prompt tokens and up to "
        f"{int(plan.max_new_tokens[sequence])} new ones need more KV than the budget of {budget} "
        "bytes; raise --kv-budget"
    )
    timing = Timing(queue_s=now_s)
    return Completion(sequence, (), "error", 0, timing, "KVBudgetExceeded", message)


def _timing(row: LiveRow, now_s: float) -> Timing:
    """See the picture in `records`. A shared span's time is divided among the sequences below."""
    spans = [needed.span for needed in row.place.needs]
    shared = sum(span.prefill_s / span.num_sequences for span in spans)
    return Timing(
        queue_s=row.admitted_s,
        prefill_s=row.place.span.prefill_s,
        prefill_amortized_s=shared,
        decode_s=now_s - row.first_token_s,
        ttft_s=row.first_token_s,
        latency_s=now_s,
    )
