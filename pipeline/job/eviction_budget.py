"""How much of a conversation a job keeps, from its settings and the model. Knows no rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.errors import ModelError, UsageError
from pipeline.generation import length_limit, resolve_sampling
from pipeline.model.families import why_nothing_is_evicted
from pipeline.plan.conversations import Eviction
from pipeline.records import MOST_NEW_TOKENS
from pipeline.settings import JobSettings
from pipeline.tokens.tokenizer import PromptTokenizer

if TYPE_CHECKING:
    from pipeline.model.shape import ModelShape

LEAST_ROOM = 32
"""Tokens of a budget beside what always stays and an answer."""
_SHARE_OF_WINDOW = 0.9


def eviction_of(settings: JobSettings, shape: ModelShape | None) -> Eviction:
    """What becomes of histories that do not fit; without a known window they all do."""
    asked, window = settings.conversations, None if shape is None else shape.context_length
    budget = asked.budget_tokens or int((window or MOST_NEW_TOKENS) * _SHARE_OF_WINDOW)
    return Eviction(
        evictor=asked.evict,
        budget_tokens=budget,
        window=window or MOST_NEW_TOKENS,
        evict_to=asked.evict_to,
        sink_tokens=asked.num_sink_tokens,
        gist_tokens=asked.num_gist_tokens,
        unit=asked.evict_unit,
        positions=asked.positions,
        on_full=asked.on_full,
        seed=settings.sampling.seed,
    )


def check_eviction(
    settings: JobSettings, shape: ModelShape | None, tokenizer: PromptTokenizer
) -> None:
    """Raises UsageError for a budget that cannot work, ModelError for a model that cannot."""
    own = {} if shape is None else shape.generation_config
    params = resolve_sampling(settings.sampling, own, {})
    if not settings.conversations.evicts or shape is None:
        return
    if length_limit(params) is not None:
        raise UsageError(
            "the max_length of the model's generation_config.json counts all that was said before, "
            f"so --evict {settings.conversations.evict} would let no conversation go on behind it; "
            "choose --max-new-tokens"
        )
    if shape.context_length is None and settings.conversations.budget_tokens is None:
        raise UsageError(
            f"{settings.model.model} does not say how long its context is, so name --budget-tokens"
        )
    eviction = eviction_of(settings, shape)
    reason = why_nothing_is_evicted(shape.family, shape.slides, eviction.evictor)
    if reason is not None:
        raise ModelError(f"{settings.model.model}: {reason}")
    if eviction.budget_tokens > eviction.window:
        raise UsageError(
            f"--budget-tokens {eviction.budget_tokens} exceeds the model's context of "
            f"{eviction.window} tokens; lower it"
        )
    first = max(always_kept(eviction), _system_tokens(settings, eviction, tokenizer))
    least = first + LEAST_ROOM + params.max_new_tokens
    if eviction.budget_tokens < least:
        said = (
            f"{first} first tokens that stay, {LEAST_ROOM} others and {params.max_new_tokens} new"
        )
        by_gist = eviction.evictor in ("gist", "gist-recent") and first == eviction.gist_tokens
        lower = " or --gist-tokens" if by_gist else ""
        raise UsageError(
            f"a budget of {eviction.budget_tokens} tokens is too small for {said}; raise "
            f"--budget-tokens to {least}, or lower --max-new-tokens{lower}"
        )


def _system_tokens(settings: JobSettings, eviction: Eviction, tokenizer: PromptTokenizer) -> int:
    """Of the system prompt of the job, which always stays but by "window"."""
    text = settings.tokens.system_prompt
    if text is None or eviction.evictor == "window":
        return 0
    return len(tokenizer.encode_batch([[{"role": "system", "content": text}]]).flat)


def always_kept(eviction: Eviction) -> int:
    """First tokens of a conversation that an evictor keeps, its system message aside."""
    if eviction.evictor in ("gist", "gist-recent"):
        return eviction.gist_tokens
    return eviction.sink_tokens if eviction.evictor == "sink-recent" else 0
