"""The records that cross a boundary between two stages. Knows nothing about files, text or tensors.

How time is counted, for every row (seconds, wall clock of the engine's host):

```
 engine starts        admitted            first token            last token
      |---- queue_s ----|---- prefill + waiting ---|------ decode ------|
      |------------------- ttft_s -----------------|                    |
      |---------------------------- latency_s --------------------------|
```

- `queue_s`: engine start until the row's sequence was admitted to the device.
- `prefill_s`: device time of the prompt tokens that only this row needed.
- `prefill_amortized_s`: this row's share of the prefill of shared nodes (node's time / rows below).
- `decode_s`: first token until last token, steps of its neighbours included.
- `ttft_s`: engine start until the first token; `latency_s`: engine start until the last token.

How tokens are counted, for every row:

- `reuse_depth` is *planned*: prompt tokens on tree nodes shared with at least one other row.
- `cached_tokens` is *measured* and has the meaning of OpenAI and vLLM: prompt tokens that were not
  computed for this row because an earlier row had already needed them. The first row of a group
  pays for the group's prefix. Hence, over a whole cold run, sum(prompt_tokens) - sum(cached_tokens)
  equals the prefilled tokens, and these equal the tree's unique tokens U.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal, NamedTuple

FinishReason = Literal["stop", "length", "error"]
MOST_NEW_TOKENS: Final = 2**31 - 1
"""Numbers of tokens are kept in 32 bits here and in every engine."""
GREEDY_BELOW: Final = 1e-5
"""A temperature below this one lets no second token have a chance, but numbers overflow."""
MOST_LOGPROBS: Final = 20
MOST_SAMPLES: Final = 16_384
"""As many as vLLM allows."""

PRIOR_TURN_FAILED: Final = "PriorTurnFailed"


_NUMBERS: Final[dict[str, tuple[type, ...]]] = {
    "max_new_tokens": (int,),
    "temperature": (int, float),
    "top_p": (int, float),
    "top_k": (int, type(None)),
    "seed": (int,),
    "thinking_budget": (int, type(None)),
    "logprobs": (int, type(None)),
    "n": (int,),
}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one row is continued. A temperature of (almost) 0 means greedy; then no seed matters.

    `rules`: what else its logits go through, as JSON; see `pipeline/generation.py`.
    `constraint`: what the answer must be, as JSON; see `pipeline/constraints.py`. `opening`: ids
    that every answer under it begins with; they end the prompt of the plan, and `max_new_tokens`
    counts them no more. `thinking_budget`: most tokens before the end of thinking is forced.
    `logprobs`: of each chosen token and so many likeliest ones, None: none. `n`: answers to the
    prompt, each drawn with noise of its own; of a plan's sequences it is 1. `asked`: what a request
    asks besides, as JSON; see `pipeline/request_rules.py`.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    rules: str = ""
    constraint: str = ""
    opening: tuple[int, ...] = ()
    thinking_budget: int | None = None
    logprobs: int | None = None
    n: int = 1
    asked: str = ""

    def __post_init__(self) -> None:
        self._check_types()
        if not 1 <= self.max_new_tokens <= MOST_NEW_TOKENS:
            raise ValueError(
                f"max_new_tokens must lie in [1, {MOST_NEW_TOKENS}], got {self.max_new_tokens}"
            )
        if not 0.0 <= self.temperature <= 100.0:
            raise ValueError(f"temperature must lie in [0, 100], got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.top_k is not None and not 1 <= self.top_k <= MOST_NEW_TOKENS:
            raise ValueError(
                f"top_k must lie in [1, {MOST_NEW_TOKENS}] or be absent, got {self.top_k}"
            )
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise ValueError(f"logprobs must lie in [0, {MOST_LOGPROBS}], got {self.logprobs}")
        self._check_samples()
        if "" in self.stop:
            raise ValueError(
                "stop must not hold an empty string: it would end every answer at once"
            )
        if self.thinking_budget is not None and self.thinking_budget < 0:
            raise ValueError(f"thinking_budget must be at least 0, got {self.thinking_budget}")

    def _check_samples(self) -> None:
        if not 1 <= self.n <= MOST_SAMPLES:
            raise ValueError(f"n must lie in [1, {MOST_SAMPLES}], got {self.n}")
        if self.n > 1 and self.is_greedy:
            raise ValueError(
                f"n is {self.n}, but a temperature of 0 gives the same answer each time; leave n "
                "out, or choose a temperature"
            )

    def _check_types(self) -> None:
        """What rows bring was read from JSON and may be of any type."""
        for name, kinds in _NUMBERS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kinds):
                wanted = "a number" if float in kinds else "a whole number"
                raise ValueError(f"{name} must be {wanted}, not {type(value).__name__}")
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(
                f"ignore_eos must be true or false, not {type(self.ignore_eos).__name__}"
            )
        if not all(isinstance(text, str) for text in self.stop):
            raise ValueError("stop must be a text or a list of texts")
        if not isinstance(self.constraint, str):
            raise ValueError(f"constraint must be a text, not {type(self.constraint).__name__}")
        if not isinstance(self.opening, tuple):
            raise ValueError(f"opening must be ids, not {type(self.opening).__name__}")
        if any("\ud800" <= character <= "\udfff" for text in self.stop for character in text):
            raise ValueError("stop holds half a surrogate pair, which is not text")

    @property
    def is_greedy(self) -> bool:
        """Whether two rows with the same prompt and these parameters must get the same answer."""
        return self.temperature < GREEDY_BELOW

    @property
    def is_guided(self) -> bool:
        """Whether some tokens are ruled out, or forced, by what was said before."""
        return bool(self.constraint) or self.thinking_budget is not None

    def without_opening(self) -> SamplingParams:
        """The same for a prompt that does not end with the opening."""
        if not self.opening:
            return self
        return replace(self, opening=(), max_new_tokens=self.max_new_tokens + len(self.opening))


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds; each field is defined in the module's picture."""

    queue_s: float = 0.0
    prefill_s: float = 0.0
    prefill_amortized_s: float = 0.0
    decode_s: float = 0.0
    ttft_s: float = 0.0
    latency_s: float = 0.0


class EvictionEvent(NamedTuple):
    """What a conversation kept when it had to give up tokens.

    `at`: as many of its tokens had been computed. `kept`: runs [low, high) of them, end to end as
    low, high, low, high; one tuple for all, or one for each layer and KV head, layers first.
    """

    at: int
    kept: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class TurnState:
    """The cache of a conversation at the end of a turn, in tokens where nothing else is said.

    `history_tokens`: earlier prompts and answers. Of all that was computed so far, `kept_tokens`
    are on the device and `evicted_tokens` were given up; `evictions` times in this turn. Worst of
    the turn: `span`, from the first kept token to the newest where they stand; `ctx_frac`, that by
    the model's window; `skew`, by how much a key stands in the query's future; `runs` of kept
    tokens; `gap_ratio`, the share of positions between first and last that are empty; `mass_kept`,
    the share of the newest query's weight, mean over layers and heads, that an eviction kept.
    `sink_kept`: the conversation's first token is there. `key_turns`: how often the most turned
    key was. `prefill_peak`: most tokens there while this turn's were computed. See docs/stateful.md
    """

    history_tokens: int
    kept_tokens: int
    evicted_tokens: int
    evictions: int
    span: int
    ctx_frac: float
    skew: int
    duplicate_positions: int
    runs: int
    gap_ratio: float
    sink_kept: bool
    mass_kept: float
    key_turns: int
    prefill_peak: int
    degenerate: bool
    eviction_log: tuple[EvictionEvent, ...] = ()


class TokenLogprobs(NamedTuple):
    """Of a chosen token its log-probability, in nats; and the likeliest tokens with theirs."""

    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class Scored(NamedTuple):
    """Of a continuation: the log-probability of each of its tokens, in nats, and whether it is what
    greedy decoding would say."""

    logprobs: tuple[float, ...]
    is_greedy: bool


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine says about one sequence of the plan (`sequence` indexes `plan.sequences`).

    `token_ids` excludes nothing: an end-of-sequence token that was generated is its last element.
    `stored_tokens`: those of its prompt whose KV an earlier run had stored.
    A sequence that failed has `finish_reason == "error"` and both error fields set.

    A conversation gives one for each turn, in order: number `turn` from 0 on, whose prompt were
    `prompt_tokens`, the history counted (0: those of the plan); `state` of its cache at the end.

    Where a plan has scores nothing is generated, and `scores` are those of the sequence's requests.
    `forced_tokens` of the answer were known before they were decoded, so they never were.
    `logprobs`: of each of `token_ids`, where the row asks for them.
    """

    sequence: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    cached_tokens: int
    timing: Timing
    error_type: str | None = None
    error_message: str | None = None
    stored_tokens: int = 0
    turn: int = 0
    prompt_tokens: int = 0
    state: TurnState | None = None
    scores: tuple[Scored, ...] = ()
    forced_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()

    @classmethod
    def after_failed(cls, sequence: int, turn: int, queue_s: float = 0.0) -> Completion:
        """A turn whose conversation has failed before it."""
        message = "an earlier turn of its conversation failed, whose answer it would follow"
        return cls(sequence, (), "error", 0, Timing(queue_s), PRIOR_TURN_FAILED, message, turn=turn)


@dataclass(frozen=True, slots=True)
class EarlierTurn:
    """A turn of a conversation that an earlier session answered: what it generated, and when
    tokens were evicted while it did."""

    token_ids: tuple[int, ...]
    eviction_log: tuple[EvictionEvent, ...] = ()
