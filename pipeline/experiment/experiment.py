"""The paper's experiment: what kept KV saves, arm by arm, and whether it changed a token.

```
 baseline      everything computed
 embedding     nearest sentence embedding; reused if all of that prompt begins this one (the paper)
 tree          longest stored prefix, cut anywhere; `tree-cold`: from the disk, not yet checked
 naive-paper   as embedding, but through `generate()` with the suffix alone: the exhibit
```

Knows decoders, stores and finders; nothing of files of results.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from pipeline.errors import EngineError, InputError
from pipeline.experiment.decode import Generation, GreedyDecoder
from pipeline.experiment.finders import Finder, Found, LongestPrefix, NearestEmbedding, NoReuse
from pipeline.experiment.kept_prompts import KeptPrompt
from pipeline.experiment.naive_paper import generate_naively
from pipeline.experiment.protocol import Protocol, run_rounds
from pipeline.experiment.retrieval import EmbeddingIndex, TextEncoder, keep_vectors
from pipeline.kvstore.identity import Identity, TokenIds
from pipeline.kvstore.store import KVStore

BASELINE: Final = "baseline"
EMBEDDING: Final = "embedding"
TREE: Final = "tree"
TREE_COLD: Final = "tree-cold"
NAIVE: Final = "naive-paper"
EXACT_ARMS: Final = (EMBEDDING, TREE, TREE_COLD)
_BUDGET_BYTES: Final = 1 << 40


@dataclass(frozen=True)
class Subject:
    """A model under test. `read` makes text of answers; None: random weights, which say nothing.

    `longest`: if given, prompts of more tokens are left out; `context`: what the model can hold.
    """

    name: str
    decoder: GreedyDecoder
    encode: Callable[[Sequence[str]], list[TokenIds]]
    read: Callable[[Sequence[int]], str] | None
    identity: Identity
    context: int
    longest: int | None = None


@dataclass(frozen=True)
class Trial:
    """One run of one prompt. `latency_s` counts everything from the text on but tokenising.

    `found` is without its KV: the pages would stay mapped, and never be cold.
    """

    token_ids: tuple[int, ...]
    found: Found
    reused: int
    prefill_s: float
    decode_s: float
    latency_s: float
    route: str = ""


@dataclass(frozen=True)
class ArmRow:
    """All measured trials of one prompt in one arm."""

    model: str
    arm: str
    prompt: KeptPrompt
    prompt_tokens: int
    trials: tuple[Trial, ...]

    @property
    def first(self) -> Trial:
        """What does not change from trial to trial: tokens, reuse, source."""
        return self.trials[0]


@dataclass(frozen=True)
class Asked:
    """A test prompt and its token ids."""

    prompt: KeptPrompt
    token_ids: TokenIds


def run_experiment(
    subject: Subject,
    prompts: tuple[Sequence[KeptPrompt], Sequence[KeptPrompt]],
    encoder: TextEncoder,
    protocol: Protocol,
    folder: Path,
) -> list[ArmRow]:
    """Keep the first of `prompts` in a store in `folder`, ask the second in every arm.

    Raises InputError for prompts that do not fit the model, EngineError where recycled KV changed
    a token, or the baseline is not what transformers' own `generate` writes.
    """
    kept = _encode(subject, prompts[0])
    asked = _encode(subject, prompts[1])
    keep_all(subject, [one.token_ids for one in kept], folder)
    store = open_to_read(folder, subject.identity)
    vectors = keep_vectors(folder, encoder, [one.prompt.text for one in kept])
    index = EmbeddingIndex(encoder, vectors)
    names = [one.prompt.id for one in kept]
    nearest = NearestEmbedding(index, names, [one.token_ids for one in kept], store)
    arms = _Arms(subject, folder, nearest, LongestPrefix(store))
    runs = {(arm, one.prompt.id): run for one in asked for arm, run in arms.of(one).items()}
    results = run_rounds(runs, protocol)
    by_id = {one.prompt.id: one for one in asked}
    rows = [
        ArmRow(subject.name, arm, by_id[name].prompt, len(by_id[name].token_ids), tuple(trials))
        for (arm, name), trials in results.items()
    ]
    check_answers(subject, rows, {one.prompt.id: one.token_ids.tolist() for one in asked})
    return rows


def keep_all(subject: Subject, prompts: Sequence[TokenIds], folder: Path, tenant: str = "") -> int:
    """Compute and store the KV of whole prompts; how many of them were not there yet."""
    with KVStore.open(folder, subject.identity, _BUDGET_BYTES) as store:
        return sum(
            store.put(ids, 0, subject.decoder.compute_kv(ids.tolist()), tenant) for ids in prompts
        )


def open_to_read(folder: Path, identity: Identity) -> KVStore:
    """The store without its lock, so that it can be opened again: a closed one still reads."""
    store = KVStore.open(folder, identity, _BUDGET_BYTES)
    store.close()
    return store


def open_cold(folder: Path, identity: Identity) -> KVStore:
    """As `open_to_read`, with its entries neither in the page cache nor checked before.

    Pages that a process still has mapped stay in it. Raises OSError.
    """
    store = open_to_read(folder, identity)
    for path in folder.rglob("*.safetensors"):
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(file)  # dirty pages cannot be dropped
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)
    return store


class _Arms:
    """The ways to answer one prompt."""

    def __init__(
        self, subject: Subject, folder: Path, nearest: NearestEmbedding, longest: LongestPrefix
    ) -> None:
        self._subject = subject
        self._folder = folder
        self._nearest = nearest
        self._longest = longest

    def of(self, asked: Asked) -> dict[str, Callable[[], Trial]]:
        """Cold and naive ones only where something is reused: else they are the warm ones."""
        text, ids = asked.prompt.text, asked.token_ids
        runs: dict[str, Callable[[], Trial]] = {
            BASELINE: lambda: self._answer(NoReuse(), asked),
            EMBEDDING: lambda: self._answer(self._nearest, asked),
            TREE: lambda: self._answer(self._longest, asked),
        }
        if self._longest.find(text, ids).reused:
            runs[TREE_COLD] = lambda: self._answer_cold(asked)
        if self._nearest.find(text, ids).reused:
            runs[NAIVE] = lambda: self._answer_naively(asked)
        return runs

    def _answer(self, finder: Finder, asked: Asked) -> Trial:
        begin = time.perf_counter()
        found = finder.find(asked.prompt.text, asked.token_ids)
        done = self._subject.decoder.generate(asked.token_ids.tolist(), found.kv)
        latency_s = time.perf_counter() - begin
        return _trial(done, found, latency_s)

    def _answer_cold(self, asked: Asked) -> Trial:
        return self._answer(LongestPrefix(open_cold(self._folder, self._subject.identity)), asked)

    def _answer_naively(self, asked: Asked) -> Trial:
        begin = time.perf_counter()
        found = self._nearest.find(asked.prompt.text, asked.token_ids)
        assert found.kv is not None
        suffix = asked.token_ids[found.reused :].tolist()
        decoder = self._subject.decoder
        started = time.perf_counter()
        answer = generate_naively(decoder.model, suffix, found.kv, decoder.num_new)
        end = time.perf_counter()
        done = Generation(answer.token_ids, end - started, 0.0)
        return _trial(done, found, end - begin, answer.route)


def _trial(done: Generation, found: Found, latency_s: float, route: str = "") -> Trial:
    return Trial(
        done.token_ids, replace(found, kv=None), found.reused, done.prefill_s, done.decode_s,
        latency_s, route,
    )  # fmt: skip


def _encode(subject: Subject, prompts: Sequence[KeptPrompt]) -> list[Asked]:
    """Those short enough for the subject, as token ids. Raises InputError."""
    ids = subject.encode([prompt.text for prompt in prompts])
    found = [Asked(*pair) for pair in zip(prompts, ids, strict=True)]
    if subject.longest is not None:
        found = [one for one in found if len(one.token_ids) <= subject.longest]
        if not found:
            raise InputError(
                f"no prompt has at most {subject.longest} tokens, all that {subject.name} is "
                "asked; add shorter ones"
            )
    for one in found:
        if len(one.token_ids) + subject.decoder.num_new > subject.context:
            raise InputError(
                f"prompt {one.prompt.id} has {len(one.token_ids)} tokens, and with "
                f"{subject.decoder.num_new} new ones does not fit the {subject.context} of "
                f"{subject.name}; shorten it"
            )
    return found


def check_answers(subject: Subject, rows: Sequence[ArmRow], prompts: dict[str, list[int]]) -> None:
    """Raises EngineError for a recycled row that is not token-identical, in any trial."""
    baseline = {row.prompt.id: row.first.token_ids for row in rows if row.arm == BASELINE}
    for name, tokens in baseline.items():
        _require_same(subject, "generate()", name, tokens, subject.decoder.reference(prompts[name]))
    for row in rows:
        for trial in row.trials if row.arm in (BASELINE, *EXACT_ARMS) else ():
            name = row.prompt.id
            _require_same(subject, f"arm {row.arm}", name, baseline[name], trial.token_ids)


def _require_same(
    subject: Subject, who: str, name: str, expected: Sequence[int], got: Sequence[int]
) -> None:
    if tuple(expected) != tuple(got):
        pairs = zip(expected, got, strict=False)
        place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(got)))
        raise EngineError(
            f"{subject.name}, prompt {name}: {who} differs from the baseline at new token {place}; "
            "recycled KV must not change a token in float32, so none of these figures counts"
        )
