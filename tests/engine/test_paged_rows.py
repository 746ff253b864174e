"""Rows that grow by blocks, give way, and come back: the same answers in whatever room there is.

Every run here is watched (`Watch`): after each step of the scheduler the arena is tiled exactly,
live rows stand in depth-first order before all that wait, what they look at is on the device, the
first of them is never preempted, and after a preemption nobody enters before a row has ended.

Faults planted one at a time, each of which turned this file red, are named where they showed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engine import kv_guard, live, recordings, scheduler
from pipeline.engine.backend import Backend
from pipeline.engine.base import EngineHooks, RunControl, TokenIds
from pipeline.engine.decode_view import DecodeView, Seen
from pipeline.engine.forward import Forward, TransformersForward
from pipeline.engine.kernels.rules import AttentionRules, attend_reference
from pipeline.engine.kernels.triton_kernel import DeviceWork, TritonKernel
from pipeline.engine.kv_cache import KVCache, KVRange
from pipeline.engine.live import LiveRow
from pipeline.engine.naive_engine import NaiveEngine
from pipeline.engine.packing import PackedBatch
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.engine.scheduler import Admission, Scheduler
from pipeline.plan.plan import Plan
from pipeline.records import Completion, SamplingParams
from pipeline.settings import EngineSettings
from tests.engine import tiny
from tests.engine.integrity import check_integrity
from tests.engine.test_cuda_graphs import DirectCall
from tests.engine.test_prefix_engine import FullMemory
from tests.sweeps import sweep

PARAMS = (
    SamplingParams(max_new_tokens=140),
    SamplingParams(max_new_tokens=120, ignore_eos=True, stop=("x",)),
    SamplingParams(max_new_tokens=60, temperature=0.8, top_p=0.9, seed=7, stop=("x",)),
    SamplingParams(max_new_tokens=6, ignore_eos=True),
    SamplingParams(max_new_tokens=1),
)


def stops_somewhere(token_ids: Sequence[int], stop: tuple[str, ...], prompt: TokenIds) -> bool:
    """After 30 tokens in the mean, and a few never."""
    return (token_ids[-1] * 7 + len(token_ids)) % 31 == 0


CONTROL = RunControl(is_stopped=stops_somewhere)


class Watch:
    """Checks the scheduler after every step, and keeps what happened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most_rows = 0
        self.preempted: set[int] = set()
        self.tokens_lost = 0
        """Of preempted rows: prompt tokens of their own and generated ones with KV."""
        self.compactions = 0
        self.scheduler: Scheduler | None = None
        self._must_wait = False  # a row was preempted and none has ended since
        self._replace_methods(monkeypatch)

    def _replace_methods(self, monkeypatch: pytest.MonkeyPatch) -> None:
        admit, grow, finish, compact = (
            Scheduler.admit, Scheduler.grow, Scheduler.finish, KVCache.compact
        )  # fmt: skip

        def watched_admit(s: Scheduler, now_s: float, *, only_begun: bool = False) -> Admission:
            before = list(s.rows)
            admission = admit(s, now_s, only_begun=only_begun)
            assert s.rows == before or not self._must_wait, "entered, although none has ended"
            self._check(s)
            return admission

        def watched_grow(s: Scheduler, ahead: int = 1) -> int:
            before = list(s.rows)
            steps = grow(s, ahead)
            assert s.rows == before[: len(s.rows)], "others than the last rows were preempted"
            assert bool(s.rows) == bool(before), "the first row was preempted"
            assert all(row.next_position < row.reserved_end <= row.last_position for row in s.rows)
            self.preempted |= {row.sequence for row in before[len(s.rows) :]}
            self.tokens_lost += sum(
                row.next_position - row.place.start for row in before[len(s.rows) :]
            )
            self._must_wait |= len(s.rows) < len(before)
            self._check(s)
            return steps

        def watched_finish(s: Scheduler, row: LiveRow) -> None:
            finish(s, row)
            self._must_wait = False
            self._check(s)

        def watched_compact(cache: KVCache, ranges: list[KVRange]) -> None:
            self.compactions += 1
            compact(cache, ranges)

        monkeypatch.setattr(Scheduler, "admit", watched_admit)
        monkeypatch.setattr(Scheduler, "grow", watched_grow)
        monkeypatch.setattr(Scheduler, "finish", watched_finish)
        monkeypatch.setattr(KVCache, "compact", watched_compact)

    def assert_all_released(self) -> None:
        """After a run: not a slot is left to anybody."""
        assert self.scheduler is not None
        residency = self.scheduler._residency
        assert residency.ranges == [] and residency.cache.used_tokens == 0
        assert residency.placed == {}

    def _check(self, s: Scheduler) -> None:
        self.scheduler = s
        cache, spans = s._residency.cache, [p.span for p in s._residency.placed.values()]
        owned = [span.kv for span in spans if span.is_resident]
        owned += [block.kv for row in s.rows for block in row.blocks if block.kv.length]
        assert set(owned) == set(s._residency.ranges), "a range is reserved for nobody"
        check_integrity(cache, owned)
        assert cache.used_tokens == sum(kv.length for kv in owned)
        assert cache.used_tokens <= cache.peak_tokens <= cache.capacity
        order = [row.sequence for row in s.rows] + list(s.waiting)
        assert order == sorted(set(order))
        for row in s.rows:
            reserved = row.reserved_end - row.place.position
            assert sum(block.kv.length for block in row.blocks) == reserved
            above = [placement.span for placement in row.place.all_above()]
            assert all(span.is_resident and span.live_rows for span in above)
        idle = {span.key for span in s._residency.idle()}
        assert idle <= set(_path(s._arrivals._plan, s.waiting[0]) if s.waiting else [])
        self.most_rows = max(self.most_rows, len(s.rows))


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


BLOCKS = {"real blocks": (32, 64), "small": (3, 2), "single slots": (1, 1)}


@pytest.fixture(params=BLOCKS)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    first, later = BLOCKS[request.param]
    monkeypatch.setattr(live, "FIRST_NEW_TOKENS", first)
    monkeypatch.setattr(scheduler, "BLOCK_TOKENS", later)
    yield


def random_plan(seed: int, rows: int = 24) -> Plan:
    draw = random.Random(seed)
    prompts = tiny.random_prompts(draw, rows)
    params_of_row = [draw.choice([0, 1, 1, 2, 2, 3, 4]) for _ in prompts]
    return tiny.plan_of(prompts, PARAMS, params_of_row, draw.choice([1, 4, 16, 1000]))


def _path(plan: Plan, sequence: int) -> list[int]:
    return plan.tree.path(int(plan.tree.terminal[plan.sequences.prompt[sequence]]))


def tokens_alone(plan: Plan) -> NDArray[np.int64]:
    """[sequences] slots that each needs to run to its end with nothing beside it: the oracle."""
    below = plan.count_below(np.arange(len(plan.sequences)))
    needed = plan.prompt_lengths + plan.max_new_tokens - 1
    for sequence in range(len(needed)):
        path = [n for n in _path(plan, sequence) if below[n] > 1]
        covered = 0  # by group nodes
        for node in path:
            is_group = bool(plan.is_group[node])
            needed[sequence] += plan.tree.end[node] - plan.tree.start[node]
            if is_group:
                needed[sequence] += plan.tree.start[node] - covered
                covered = int(plan.tree.end[node])
        needed[sequence] -= covered
    return needed


def run(
    plan: Plan,
    budget_tokens: int | None = None,
    control: RunControl = CONTROL,
    kernels: str = "auto",
    **limits: Any,
) -> tuple[dict[int, Completion], PrefixEngine]:
    """All sequences of the plan; `limits` are rows and tokens of a batch."""
    loaded = tiny.load_tiny()
    budget = budget_tokens and budget_tokens * loaded.shape.kv_bytes_per_token()
    chosen: Literal["auto", "torch"] = "torch" if kernels == "torch" else "auto"
    engine = PrefixEngine(loaded, EngineSettings(kv_budget=budget, kernels=chosen, **limits))
    if kernels == "recorded":
        forward = TransformersForward(loaded.model, pack_weights=False)
        kernel = ItemsByReference(4, 2, torch.device("cpu"))
        backend = Backend(forward, kernel, recordable=kernel)
        engine = PrefixEngine(loaded, engine.settings, backend)
    return collect(engine, plan, control), engine


def collect(engine: PrefixEngine, plan: Plan, control: RunControl) -> dict[int, Completion]:
    """The completions of a run in which no token is sampled twice."""
    sampled: set[tuple[int, int]] = set()

    def note(sequences: list[int], positions: list[int], logits: Tensor) -> None:
        pairs = set(zip(sequences, positions, strict=True))
        assert len(pairs) == len(sequences) and not pairs & sampled, "a token was sampled twice"
        sampled.update(pairs)

    every = np.arange(len(plan.sequences))
    done = list(engine.generate(plan, every, control, EngineHooks(on_logits=note)))
    assert len({c.sequence for c in done}) == len(done)
    return {c.sequence: c for c in done}


class ItemsByReference(TritonKernel):
    """The GPU kernel's work items, computed by the oracle: the path of recorded steps on a CPU."""

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, work: DeviceWork, rules: AttentionRules
    ) -> Tensor:
        items = torch.cat([work.large, work.small])[:, :5].numpy()
        positions = work.positions[: len(query)]
        return attend_reference(query, keys, values, positions, items, rules)


def assert_same(plan: Plan, done: dict[int, Completion], free: dict[int, Completion]) -> None:
    """The same answers; where two tokens are as likely, each answer must be one of the model's."""
    assert done.keys() == free.keys()
    naive = NaiveEngine(tiny.load_tiny())
    for sequence, ours in done.items():
        theirs = free[sequence]
        assert ours.cached_tokens == theirs.cached_tokens
        if ours.token_ids == theirs.token_ids:
            assert ours.finish_reason == theirs.finish_reason
            continue
        prompt = plan.prompt_token_ids(sequence).tolist()
        params = plan.params[int(plan.sequences.params[sequence])]
        key = int(plan.sequences.noise_key[sequence])
        for token_ids in (ours.token_ids, theirs.token_ids):
            assert naive.replay(prompt, token_ids, params, key).deficit.max() < 1e-5


# Kernels, blocks and seed: each kernel and all blocks in the fast suite; the oracle is the slowest.
FAST = [
    *(("auto", blocks, seed) for seed, blocks in enumerate(BLOCKS)),
    ("torch", "single slots", 3),
    ("recorded", "small", 3),
]
EVERY = [
    *(("auto", blocks, seed) for blocks in BLOCKS for seed in range(6)),
    *((kernels, blocks, 3) for kernels in ("torch", "recorded") for blocks in BLOCKS),
]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(
    ("kernels", "blocks", "seed"),
    sweep(EVERY, FAST),
    indirect=["blocks"],
)
def test_any_budget_gives_the_same_answers(
    kernels: str, seed: int, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From room for the largest row alone to room for all; the prompt is prefilled once in each.

    Red with: the last generated token but one left out of what is computed again; a block's
    position counted from the row's start; kept spans not dropped after growth; `cached_tokens`
    set anew at the second admission; what is computed again counted as prefilled, of a row or of a
    node; a node kept where it is idle and in the way; the gaps not closed; the first row preempted
    instead of the last; a preempted row at the end of the queue; admission in spite of a
    preemption; first tokens sampled again; a slot given one step late.
    """
    plan = random_plan(seed)
    monkeypatch.setattr(recordings, "choose_recorder", lambda device: DirectCall())
    draw = random.Random(seed)
    free, engine = run(plan)
    assert engine.counters.recomputed_tokens == 0
    smallest = int(tokens_alone(plan).max())
    for budget in (smallest, smallest * 3 // 2, smallest * 3):
        done, engine = run(
            plan, budget, kernels=kernels,
            max_rows=draw.choice([5, 256]), max_batch_tokens=draw.choice([16, 4096]),
        )  # fmt: skip
        assert_same(plan, done, free)
        counters = engine.counters
        assert counters.prefilled_tokens == plan.tree.unique_tokens
        assert counters.prefilled_tokens + counters.cached_tokens == plan.prompt_lengths.sum()
        assert counters.generated_tokens == sum(len(c.token_ids) for c in done.values())
        watch.assert_all_released()


@pytest.mark.parametrize("seed", sweep(range(12), range(3)))
def test_rows_may_be_preempted_at_any_moment(
    seed: int, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At random, whatever room there is: after the first token, many at once, again and again.

    Red with: the head of short edges not copied for a row that has nothing else to compute again.
    """
    plan = random_plan(seed)
    free, _ = run(plan)
    draw = random.Random(seed)
    grow = Scheduler.grow

    def disturbed(s: Scheduler, ahead: int = 1) -> int:
        for _ in range(draw.choice([0, 0, 0, 0, 1, 3])):
            if len(s.rows) > 1 or s._residency.idle():
                s._make_room()
        return grow(s, ahead)

    monkeypatch.setattr(Scheduler, "grow", disturbed)
    done, engine = run(plan, max_rows=draw.choice([3, 256]))
    assert_same(plan, done, free)
    assert engine.counters.prefilled_tokens == plan.tree.unique_tokens
    assert engine.counters.recomputed_tokens > 0
    watch.assert_all_released()


@pytest.mark.parametrize("seed", sweep(range(4), (0, 1)))
def test_exactly_the_rows_that_do_not_fit_alone_are_refused(seed: int, watch: Watch) -> None:
    """Red with: only the first block counted; the nodes above not counted; a refused row that does
    not give up its share in the nodes above, which then stay until the end."""
    plan = random_plan(seed)
    free, _ = run(plan)
    needed = tokens_alone(plan)
    budget = int(np.sort(needed)[-4]) - 1
    done, _ = run(plan, budget)
    refused = {s for s, c in done.items() if c.error_type == "KVBudgetExceeded"}
    assert refused == set(np.flatnonzero(needed > budget).tolist()) and len(refused) >= 4
    assert all(done[s].token_ids == free[s].token_ids for s in done.keys() - refused)
    watch.assert_all_released()


def same_length_plan(max_new_tokens: int, rows: int = 60) -> Plan:
    """Below a prefix of 20 tokens, `rows` that have 8 of their own."""
    draw = random.Random(1)
    shared = [draw.randrange(4, tiny.VOCABULARY) for _ in range(20)]
    own = [[*shared, 4 + i, *(draw.randrange(4, 97) for _ in range(7))] for i in range(rows)]
    params = SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True, stop=("x",))
    return tiny.plan_of(own, (params,))


def test_short_answers_do_not_wait_for_room_that_they_never_use(watch: Watch) -> None:
    """Answers of 10 tokens where 512 are allowed. When a row reserved all of them, four filled
    this budget, and the job took 15 times 10 forwards."""
    plan = same_length_plan(512)
    after_ten = RunControl(is_stopped=lambda token_ids, stop, prompt: len(token_ids) >= 10)
    free, _ = run(plan, None, after_ten)
    watch.most_rows = 0
    done, engine = run(plan, 20 + 4 * (8 + 511), after_ten)
    assert_same(plan, done, free)
    assert watch.most_rows == 4 * (8 + 511) // (8 + live.FIRST_NEW_TOKENS) == 51
    assert engine.counters.num_forwards == 20
    assert engine.counters.recomputed_tokens == 0 and not watch.preempted


@pytest.mark.fault(
    "out of memory where KV grows",
    injected="a budget that answers outgrow",
    outcome="the last row waits and is computed again; counted",
)
def test_rows_that_run_to_the_end_are_preempted_and_counted(watch: Watch) -> None:
    """All reach 120 tokens where room was taken for a quarter of them. What comes back is a suffix
    of 8 and what was generated but for its last token; the prefix has always a row below it.

    With room nothing is computed twice. Red with: rows admitted as if the live ones would not grow
    (2248 tokens instead of 1368).
    """
    plan = same_length_plan(120)
    never = RunControl()
    free, engine = run(plan, None, never)
    assert engine.counters.recomputed_tokens == 0 and not watch.preempted
    done, engine = run(plan, 20 + 12 * (8 + 119), never)
    assert_same(plan, done, free)
    assert watch.preempted and watch.compactions
    assert engine.counters.recomputed_tokens == watch.tokens_lost > 0
    assert engine.counters.recomputed_tokens < engine.counters.generated_tokens / 4
    assert engine.counters.num_forwards < 5 * 120, "twelve at a time would need as many"


def test_logits_after_a_preemption_equal_plain_attention(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens may agree by luck; every logit does not."""
    monkeypatch.setattr(live, "FIRST_NEW_TOKENS", 3)
    monkeypatch.setattr(scheduler, "BLOCK_TOKENS", 2)
    plan = random_plan(3)
    loaded = tiny.load_tiny()
    budget = int(tokens_alone(plan).max()) * loaded.shape.kv_bytes_per_token()
    engine = PrefixEngine(loaded, EngineSettings(kv_budget=budget))
    hooks, seen = tiny.watch_logits()
    done = list(engine.generate(plan, np.arange(len(plan.sequences)), CONTROL, hooks))
    assert len(watch.preempted) >= 4
    loaded.model.set_attn_implementation("eager")
    for completion in done:
        prompt = plan.prompt_token_ids(completion.sequence).tolist()
        expected = loaded.model(torch.tensor([[*prompt, *completion.token_ids[:-1]]])).logits[0]
        got = [seen[completion.sequence, i] for i in range(len(completion.token_ids))]
        torch.testing.assert_close(
            torch.stack(got), expected[len(prompt) - 1 :], atol=2e-5, rtol=1e-5
        )


def test_times_of_a_preempted_row_go_by_its_first_admission(watch: Watch) -> None:
    """Red with `admitted_s` or `first_token_s` set anew, and with the repeated prefill charged."""
    plan = same_length_plan(120, rows=40)
    done, engine = run(plan, 20 + 8 * (8 + 119), RunControl())
    first_wave = [s for s in watch.preempted if done[s].timing.queue_s == done[0].timing.queue_s]
    assert first_wave, "a row of the first admission was preempted"
    for completion in done.values():
        timing = completion.timing
        assert timing.queue_s + timing.prefill_s <= timing.ttft_s <= timing.latency_s
        assert (
            timing.decode_s == pytest.approx(timing.latency_s - timing.ttft_s) and timing.decode_s
        )
    charged = sum(c.timing.prefill_s + c.timing.prefill_amortized_s for c in done.values())
    assert engine.counters.recomputed_tokens > 0 and charged < engine.counters.prefill_s * 0.9


def test_a_drain_finishes_preempted_rows_too(watch: Watch) -> None:
    """They were begun, and their answers are half there; none that was not begun is let in."""
    plan = same_length_plan(120)
    control = RunControl(should_drain=lambda: bool(watch.preempted))
    free, _ = run(plan, None, RunControl())
    done, _ = run(plan, 20 + 8 * (8 + 119), control)
    assert watch.preempted <= done.keys() == set(range(len(done)))
    assert len(done) < len(plan.sequences)
    assert_same(plan, done, {s: free[s] for s in done})


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("most_tokens", [1, 7])
def test_preemption_and_memory_that_ends_go_together(most_tokens: int, watch: Watch) -> None:
    """Batches are halved, prefill that is repeated among them."""
    plan = random_plan(3)
    free, _ = run(plan)
    loaded = tiny.load_tiny()
    budget = int(tokens_alone(plan).max() * 1.5) * loaded.shape.kv_bytes_per_token()
    engine = PrefixEngine(loaded, EngineSettings(kv_budget=budget))
    forward = FullMemory(engine.backend.forward, most_tokens)
    engine = tiny.with_backend(engine, forward=forward)
    assert_same(plan, collect(engine, plan, CONTROL), free)
    assert forward.refused and engine.counters.prefilled_tokens == plan.tree.unique_tokens


class NoMemory:
    """A forward that computes nothing until `is_full` is cleared."""

    name = "no memory"

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self.is_full = True

    def __call__(self, batch: PackedBatch, cache: KVCache, keep: Tensor) -> Tensor:
        if self.is_full:
            cache.arena.fill_(float("nan"))  # what is not written yet is not right by chance
            raise torch.OutOfMemoryError("planted")
        return self._forward(batch, cache, keep)


def test_a_node_whose_prefill_failed_is_computed_for_the_rows_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Red when the node kept its range: the rows after the lost ones looked at what was never
    written, as all did before nodes could be evicted."""
    monkeypatch.setattr(kv_guard, "_LEAST_INTERVAL_S", 0.0)  # rows are yielded as they end
    shared = list(range(10, 40))
    plan = tiny.plan_of([[*shared, 50 + i] for i in range(6)], (tiny.LONGER,))
    free, _ = run(plan)
    engine = PrefixEngine(tiny.load_tiny(), EngineSettings(max_rows=2))
    forward = NoMemory(engine.backend.forward)
    engine = tiny.with_backend(engine, forward=forward)
    done = {}
    for completion in engine.generate(plan, np.arange(6), RunControl()):
        forward.is_full = False  # once the first rows are lost
        done[completion.sequence] = completion
    assert {s for s, c in done.items() if c.error_type == "OutOfMemory"} == {0, 1}
    assert all(done[s].token_ids == free[s].token_ids for s in range(2, 6))


@given(st.lists(st.tuples(st.sampled_from("aalerc"), *[st.integers(0, 9)] * 2), max_size=40))
@settings(max_examples=200, deadline=None)
def test_ranges_that_grow_and_move_keep_their_contents(steps: list[tuple[str, int, int]]) -> None:
    """(a)cquire, acquire from the (l)eft, (e)xtend, (r)elease, (c)ompact; slots are written once.

    Red with: a range extended over its neighbour; a gap in which a range has its place lost.
    """
    cache = KVCache((1, 1, 1), 30, like=torch.zeros(1))
    owned: list[tuple[KVRange, list[float]]] = []
    for number, (step, place, length) in enumerate(steps):
        if step in "al":
            new = cache.acquire(length, from_left=step == "l", reach=length + place)
            if new is not None:
                owned.append((new, []))
        elif step == "c":
            cache.compact([kv_range for kv_range, _ in owned])
        elif owned and step == "r":
            cache.release(owned.pop(place % len(owned))[0])
        elif owned:
            kv_range, _ = owned[place % len(owned)]
            if kv_range.length and not cache.extend(kv_range, 1 + length):
                assert kv_range.start + kv_range.length + length >= min(
                    [r.start for r, _ in owned if r.start > kv_range.start and r.length] + [30]
                )
        check_integrity(cache, [kv_range for kv_range, _ in owned])
        for kv_range, contents in owned:
            slots = cache.arena[0, 0, 0, kv_range.start : kv_range.start + kv_range.length, 0]
            fresh = kv_range.length - len(contents)
            slots[len(contents) :] = number
            contents += [float(number)] * fresh
            assert slots.tolist() == contents


def test_a_range_goes_where_it_can_grow_and_is_one_span_then() -> None:
    cache = KVCache((1, 1, 1), 100, like=torch.zeros(1))
    one, two = (cache.acquire(10, from_left=False, reach=40) for _ in range(2))
    assert one and two and (one.start, two.start) == (60, 20)
    three = cache.acquire(10, from_left=False, reach=40)
    assert three and three.start == 90, "room to grow is nobody's until it is used"
    assert cache.extend(one, 20) and not cache.extend(one, 1)
    assert cache.extend(two, 30) and (two.length, cache.used_tokens) == (40, 80)


def test_with_room_a_row_stays_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paging costs decode steps nothing where memory is no limit: the same spans as before."""
    before = DecodeView.before
    most_blocks = []

    def watched(view: DecodeView, rows: list[LiveRow], changes: int) -> Seen:
        most_blocks.append(max(len(row.blocks) for row in rows))
        return before(view, rows, changes)

    monkeypatch.setattr(DecodeView, "before", watched)
    run(same_length_plan(120, rows=10), None, RunControl())
    assert set(most_blocks) == {1} and len(most_blocks) == 119
