"""What every engine promises. An engine turns token ids into token ids, never text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.engine.counters import EngineCounters
from pipeline.engine.grammars import Matcher, Tags
from pipeline.engine.kv_connector import KVConnector, KVFormat
from pipeline.errors import EngineError
from pipeline.plan.plan import Plan
from pipeline.records import Completion, EarlierTurn, SamplingParams
from pipeline.settings import JobSettings

if TYPE_CHECKING:
    from torch import Tensor


TokenIds = Sequence[int] | NDArray[np.unsignedinteger]
Indices = NDArray[np.int64]
"""Places in an array of a plan, ascending."""


class StopCheck(Protocol):
    """Whether a stop string ends in the text of these generated ids; it may begin in the prompt."""

    def __call__(
        self, token_ids: Sequence[int], stop: tuple[str, ...], prompt: TokenIds
    ) -> bool: ...


class Grammars(Protocol):
    """What constraints mean in token ids. Can be sent to another process."""

    @property
    def vocabulary_size(self) -> int:
        """Token ids that it knows."""

    @property
    def tags(self) -> Tags | None:
        """Of thinking; None: the model has none."""

    def matcher(self, constraint: str) -> Matcher:
        """At the beginning of an answer. Raises ValueError where it cannot be compiled."""

    def fill(self, matchers: Sequence[Any]) -> NDArray[np.int32]:
        """[matchers, words] which tokens may follow: a bit each, the first id lowest. Matchers are
        its own."""


@dataclass(frozen=True)
class RunControl:
    """How the caller steers a running engine without knowing it."""

    should_drain: Callable[[], bool] = lambda: False
    """True: admit nothing more, finish the rows on the device, then return."""
    should_abort: Callable[[], bool] = lambda: False
    """True: return at once."""
    is_stopped: StopCheck = lambda token_ids, stop, prompt: False
    grammars: Grammars | None = None
    """Needed where a plan has constraints."""
    wants_back: Callable[[], bool] = lambda: False
    """True: `take_back` has something to ask. An engine need not look."""
    take_back: Callable[[Sequence[int]], int] = lambda waiting: 0
    """Given the sequences that have not begun, in the order in which they would, returns how many
    of them, from the end, the engine must forget: it neither runs nor yields them."""


OnLogits = Callable[[list[int], list[int], "Tensor"], None]
"""Called with (sequences, output positions, logits [rows, V]) of every token that is chosen."""

ForceTokens = Callable[[list[int], list[int]], list[int]]
"""Called with (sequences, output positions); its tokens are taken instead of the chosen ones."""


EarlierTurns = Callable[[int], Sequence[EarlierTurn]]
"""Called with a sequence; the turns that were answered before, from the first on."""


@dataclass(frozen=True)
class EngineHooks:
    """What a caller sees of one `generate` call and puts into it; None: nothing."""

    on_logits: OnLogits | None = None
    force_tokens: ForceTokens | None = None
    kv_connector: KVConnector | None = None
    """States of earlier runs to load, and where those of this run are kept."""
    earlier_turns: EarlierTurns | None = None
    """Of conversations that an earlier session has begun: they go on after these."""


NO_HOOKS: Final = EngineHooks()


@dataclass(frozen=True)
class EngineCapabilities:
    """What an engine can do. Callers ask this, never the engine's name or type."""

    computes_once: bool = False
    """It computes each distinct prompt token once, so its counts must be those of the plan."""
    replays_noise: bool = True
    """Sampled answers follow from the plan's noise keys, so that an audit can draw them again."""
    measures_rates: bool = False
    """Its counters hold the times of prefill and decode on one device of this machine."""
    shows_logits: bool = False
    """It calls `on_logits` and `force_tokens`."""
    moves_documents: bool = False
    """It computes a plan's documents where there are any, not its whole prompts."""
    carries_conversations: bool = False
    """It answers all turns of a plan's conversations, and reads `earlier_turns`."""
    evicts: bool = False
    """It keeps conversations within `Eviction.budget_tokens`; others send them again in full."""
    reads_scores: bool = False
    """It gives a plan's scores instead of answers."""
    guides: bool = False
    """It holds answers to `SamplingParams.constraint`."""
    gives_logprobs: bool = False
    """It gives log-probabilities of what it says, where rows ask for them."""
    kv: KVFormat | None = None
    """The form of what it exchanges with `kv_connector`; None: it exchanges none."""
    saves_from: int | None = None
    """Depth from which on a conversation that gives way is saved to memory of the host, and not
    computed again; None: nobody measured it."""

    def check(self, plan: Plan, hooks: EngineHooks) -> None:
        """Raises EngineError for hooks, documents or turns that the engine would leave out in
        silence."""
        if plan.documents is not None and not self.moves_documents:
            raise EngineError(
                "this engine reuses no document at another position; choose --reuse prefix"
            )
        if plan.scores is not None and not self.reads_scores:
            raise EngineError("this engine reads no scores; choose --engine prefix")
        if not self.gives_logprobs and any(p.logprobs is not None for p in plan.params):
            raise EngineError("this engine gives no logprobs; choose --engine prefix")
        turns = plan.conversations
        if turns is not None and not self.carries_conversations:
            raise EngineError("this engine answers no conversations; choose --engine prefix")
        if turns is not None and turns.eviction.evictor != "none" and not self.evicts:
            raise EngineError("this engine evicts nothing; choose --engine prefix or --evict none")
        if not self.guides and any(params.is_guided for params in plan.params):
            raise EngineError(
                "this engine does not hold answers to a schema, an expression or a grammar; choose "
                "--engine prefix"
            )
        unknown = {
            "on_logits": hooks.on_logits is not None and not self.shows_logits,
            "force_tokens": hooks.force_tokens is not None and not self.shows_logits,
            "kv_connector": hooks.kv_connector is not None and self.kv is None,
            "earlier_turns": hooks.earlier_turns is not None and not self.carries_conversations,
        }
        for name in (name for name, is_unknown in unknown.items() if is_unknown):
            raise EngineError(f"this engine does not know the hook {name}")

    @staticmethod
    def recorded(engine: dict[str, Any]) -> EngineCapabilities:
        """Of the engine that a run directory names; those of older runs name nothing else."""
        name, known = engine.get("name"), engine.get("capabilities")
        if known is None:
            return EngineCapabilities(name == "prefix", name != "vllm")
        return EngineCapabilities(known["computes_once"], known["replays_noise"])


class Engine(Protocol):
    """Runs sequences of a plan. One engine object owns one device and one model.

    Nothing of it is assigned from outside: what it is made of its constructor takes, what concerns
    one call `generate` takes.
    """

    name: str
    counters: EngineCounters
    notes: list[str]
    """What a person should know about this engine: self-test, fallbacks."""

    @property
    def capabilities(self) -> EngineCapabilities:
        """What it can do; the same for its whole life."""

    def generate(
        self, plan: Plan, sequences: Indices, control: RunControl, hooks: EngineHooks = NO_HOOKS
    ) -> Iterator[Completion]:
        """Yield one completion for each of `sequences` (ascending indices into `plan.sequences`).

        Completions come as they finish. `counters` is new from the call on. A sequence that cannot
        run yields a completion with an error; only a fault of the engine itself raises EngineError.
        """

    def close(self) -> None:
        """Give back what is not this process's own memory, in bounded time; twice is once."""


class LocalEngine:
    """What the engines of this process have in common. See `Engine`."""

    capabilities = EngineCapabilities()

    def __init__(self, notes: Iterable[str] = ()) -> None:
        self.counters = EngineCounters()
        self.notes = [*notes]

    def generate(
        self, plan: Plan, sequences: Indices, control: RunControl, hooks: EngineHooks = NO_HOOKS
    ) -> Iterator[Completion]:
        self.capabilities.check(plan, hooks)
        self.counters = EngineCounters()
        return self._completions(plan, sequences, control, hooks)

    def close(self) -> None:
        """See `Engine.close`: it holds nothing but memory of this process."""

    def _completions(
        self, plan: Plan, sequences: Indices, control: RunControl, hooks: EngineHooks
    ) -> Iterator[Completion]:
        raise NotImplementedError


EngineFactory = Callable[[JobSettings], Engine]
"""Makes the engine that the settings name, with its model loaded. Raises ModelError, UsageError."""


class Replay(NamedTuple):
    """Teacher-forced look at one answer: arrays of length n = number of output tokens.

    `predicted[i]` is what the baseline would say given prompt + output[:i]: its argmax for a greedy
    row, what it would draw with the same noise for a sampled one. `logprob[i]` is the baseline's
    log-probability (nats) of the token that the run gave. float64 all.

    How near the choice was: for a greedy row in nats, `margin[i]` between the two best tokens and
    `deficit[i]` between `predicted[i]` and the run's token. For a sampled row in probability
    mass: how far the noise lies from leaving the interval of `predicted[i]`, and from entering that
    of the run's token. `deficit` is 0 where they agree, NaN where the logits were.
    """

    predicted: NDArray[np.int64]
    logprob: NDArray[np.float64]
    margin: NDArray[np.float64]
    deficit: NDArray[np.float64]


class Deviation(NamedTuple):
    """How the logits of another way of computing differ from the baseline's, by output position.

    Arrays of length n, all for the same given tokens. `differs` bool: another token is chosen.
    `kl` float64: divergence of the distribution from the baseline's, nats. `gap` float64: by how
    much the distance between the baseline's two likeliest tokens changes, nats.
    """

    differs: NDArray[np.bool_]
    kl: NDArray[np.float64]
    gap: NDArray[np.float64]


class Likelihood(NamedTuple):
    """What the baseline says of a continuation: log-probability in nats, `tokens`; `deficit`: by
    how much, at most, one of them is less likely than the likeliest token; `margin`: by how much,
    at least, that one is before the second."""

    loglikelihood: float
    tokens: int
    deficit: float
    margin: float


class Baseline(Protocol):
    """The honest reference: full prefill, batch of one, nothing shared. Used by the audit."""

    def replay(
        self, prompt: Sequence[int], output: Sequence[int], params: SamplingParams, noise_key: int
    ) -> Replay:
        """One full prefill of prompt + output; no reuse of any kind. `noise_key` as in the plan."""

    def generate_one(self, prompt: Sequence[int], params: SamplingParams) -> tuple[int, ...]:
        """Plain `generate`, batch of one, no padding; greedy, and blind to stop strings.

        Ends with EOS if one was generated, else after `max_new_tokens`.
        """
