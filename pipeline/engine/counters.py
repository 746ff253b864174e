"""What an engine counts while it runs. Knows nothing about what it runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EngineCounters:
    """Live counts of one `generate` call; another thread may read them at any moment.

    `busy_s` is the time inside forward passes and sampling; `span_s` runs from the start of the
    first of them to the end of the last, so `busy_s / span_s` is how busy the device was kept.
    `memory_retries`: steps that ran out of memory and were done again in halves.
    `prefilled_tokens` counts each prompt token the first time that it is computed;
    `recomputed_tokens`: prompt and generated tokens whose KV had to give way and came back.
    `forced_tokens`: of the generated ones, those that were known before they were decoded.
    `loaded_tokens`: prompt tokens whose KV came from an earlier run; `load_s`: what that took, in
    no other time.
    `kv_faults`: times that the KV of a shared prefix was found changed, and computed again.
    `saved_conversations`: times that one gave way and its KV was saved to memory of the host;
    `repeated_conversations`: that it was computed again instead.

    Of several devices: sums, seconds of all devices together, and `peak_kv_bytes` of the fullest
    one. `replicated_tokens`: prompt tokens that more than one of them had to compute, or one of
    them again; `lost_workers`: those that died, what they had counted since their last word with
    them.
    """

    prefilled_tokens: int = 0
    recomputed_tokens: int = 0
    loaded_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    forced_tokens: int = 0
    peak_kv_bytes: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    load_s: float = 0.0
    busy_s: float = 0.0
    span_s: float = 0.0
    num_forwards: int = 0
    memory_retries: int = 0
    kv_faults: int = 0
    saved_conversations: int = 0
    repeated_conversations: int = 0
    replicated_tokens: int = 0
    lost_workers: int = 0
