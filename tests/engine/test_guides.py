"""Answers that are held to a grammar: by the engine's masks and forced runs, and one by one."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine import answering
from pipeline.engine.base import NO_HOOKS, EngineCapabilities, EngineHooks, RunControl
from pipeline.engine.guides import Guide, over_at, prepare
from pipeline.engine.naive_engine import NaiveEngine
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.errors import EngineError
from pipeline.plan.openings import append_openings, opened
from pipeline.plan.plan import Plan
from pipeline.records import Completion, SamplingParams
from pipeline.settings import EngineSettings
from tests import conversation_plan
from tests.engine import tiny
from tests.engine.automata import Automata, Automaton, Thinks, accepts, anything, draw_constraint
from tests.engine.tiny import EOS
from tests.sweeps import diagonal, sweep

GREEDY = SamplingParams(max_new_tokens=24)
SAMPLED = SamplingParams(max_new_tokens=24, temperature=0.9, top_p=0.95, top_k=30, seed=3)
PENALISED = replace(GREEDY, rules=json.dumps({"repetition_penalty": 1.4}))


def run(
    engine: PrefixEngine | NaiveEngine,
    plan: Plan,
    grammars: Automata | None = None,
    hooks: EngineHooks = NO_HOOKS,
) -> dict[int, Completion]:
    control = RunControl(grammars=grammars or Automata())
    done = list(engine.generate(plan, np.arange(len(plan.sequences)), control, hooks))
    assert len({c.sequence for c in done}) == len(done) == len(plan.sequences)
    return {c.sequence: c for c in done}


def random_plan(seed: int, rows: int = 30, **changes: object) -> Plan:
    """Free rows beside greedy, sampled and penalised ones under a handful of constraints."""
    draw = random.Random(seed)
    constraints = ["", *(draw_constraint(draw) for _ in range(4))]
    params = tuple(
        replace(base, constraint=constraint, **changes)  # type: ignore[arg-type]
        for constraint in constraints
        for base in (GREEDY, SAMPLED, PENALISED)
    )
    prompts = tiny.random_prompts(draw, rows)
    return tiny.plan_of(prompts, params, [draw.randrange(len(params)) for _ in prompts])


def ids_of(done: dict[int, Completion]) -> dict[int, tuple[int, ...]]:
    return {sequence: completion.token_ids for sequence, completion in done.items()}


def check_words(plan: Plan, done: dict[int, Completion]) -> None:
    """Every constrained answer is a word of its automaton, or says that it was cut."""
    for sequence, completion in done.items():
        params = plan.params_of(sequence)
        if params.constraint and completion.finish_reason != "length":
            assert completion.finish_reason == "stop", completion
            assert accepts(params.constraint, completion.token_ids), completion


@pytest.mark.parametrize(("family", "seed"), diagonal(tiny.FAMILIES, range(3)))
def test_forced_runs_say_what_one_by_one_says(seed: int, family: str) -> None:
    plan, loaded = random_plan(seed), tiny.load_tiny(family)
    engine = PrefixEngine(loaded, EngineSettings(max_rows=11, max_batch_tokens=64))
    ours, plain = run(engine, plan), run(NaiveEngine(loaded), plan)
    assert engine.counters.forced_tokens > 0
    assert engine.counters.forced_tokens == sum(c.forced_tokens for c in ours.values())
    assert engine.counters.generated_tokens == sum(len(c.token_ids) for c in ours.values())
    assert engine.counters.prefilled_tokens == plan.tree.unique_tokens
    for sequence, completion in plain.items():
        assert ours[sequence].token_ids == completion.token_ids
        assert ours[sequence].finish_reason == completion.finish_reason
        assert completion.forced_tokens == 0
    check_words(plan, ours)


def test_forced_runs_take_fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = [{"8": 1, "9": 1}, *({"20": i + 2} for i in range(15)), {"8": 17, "9": 17}, {}]
    word = json.dumps({"next": chain, "ends": [17]})
    prompts = [[9, i] for i in range(10, 40)]
    plan = tiny.plan_of(prompts, (replace(GREEDY, constraint=word),))
    loaded = tiny.load_tiny()
    engine = PrefixEngine(loaded, EngineSettings())
    with_runs, steps = run(engine, plan), engine.counters.num_forwards
    monkeypatch.setattr(answering, "LEAST_RUN", 10_000)
    without = run(engine, plan)
    assert engine.counters.forced_tokens == 0
    assert (steps, engine.counters.num_forwards) == (2, 17)
    assert ids_of(with_runs) == ids_of(without)


def on_a_share(plan: Plan, share: int) -> tuple[dict[int, Completion], dict[int, Completion]]:
    """By an engine with a share of the room for KV that it would take, and by one with all."""
    loaded = tiny.load_tiny()
    free = PrefixEngine(loaded, EngineSettings())
    expected = run(free, plan)
    most = int(plan.most_tokens.max()) * loaded.shape.kv_bytes_per_token()
    budget = max(free.counters.peak_kv_bytes // share, most + most // 4)
    tight = PrefixEngine(loaded, EngineSettings(kv_budget=budget, max_batch_tokens=32))
    done = run(tight, plan)
    assert tight.counters.peak_kv_bytes <= budget
    return done, expected


@pytest.mark.parametrize("share", [2, 3, 6])
def test_a_small_budget_preempts_rows_and_changes_nothing(share: int) -> None:
    done, expected = on_a_share(random_plan(5, max_new_tokens=90), share)
    assert ids_of(done) == ids_of(expected)


def test_memory_that_ends_halves_the_forward_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, loaded = random_plan(2), tiny.load_tiny()
    expected = run(PrefixEngine(loaded, EngineSettings()), plan)
    engine = PrefixEngine(loaded, EngineSettings())
    forward = engine.backend.forward
    failed: list[int] = []

    def small(batch, cache, keep):  # type: ignore[no-untyped-def]
        if batch.input_ids.shape[1] > 40 and len(failed) < 40:
            failed.append(1)
            raise MemoryError("no room")
        return forward(batch, cache, keep)

    done = run(tiny.with_backend(engine, forward=small), plan)
    assert failed
    assert ids_of(done) == ids_of(expected)


def test_free_rows_keep_their_bits_beside_masked_ones() -> None:
    """A mask that rules nothing out must leave every logit and every step as it was."""
    draw = random.Random(4)
    prompts = tiny.random_prompts(draw, 16)
    kinds = [i % 2 for i in range(16)]
    loaded = tiny.load_tiny()
    free, free_logits = tiny.watch_logits()
    params = (GREEDY, replace(GREEDY, seed=1))
    plain = run(PrefixEngine(loaded, EngineSettings()), tiny.plan_of(prompts, params, kinds),
                hooks=free)  # fmt: skip
    beside, seen = tiny.watch_logits()
    params = (GREEDY, replace(GREEDY, seed=1, constraint=anything()))
    masked = run(PrefixEngine(loaded, EngineSettings()), tiny.plan_of(prompts, params, kinds),
                 hooks=beside)  # fmt: skip
    assert ids_of(plain) == ids_of(masked)
    assert seen.keys() == free_logits.keys()
    assert all(torch.equal(seen[at], free_logits[at]) for at in seen)


@pytest.mark.parametrize("base", [GREEDY, SAMPLED])
def test_an_opening_in_the_prompt_is_an_opening_that_is_decoded(base: SamplingParams) -> None:
    draw, loaded = random.Random(9), tiny.load_tiny()
    constraint = draw_constraint(draw)
    while len(Automaton(constraint).forced()) < 5:
        constraint = draw_constraint(draw)
    opening = tuple(Automaton(constraint).forced())
    asked = replace(base, constraint=constraint)
    prompts = [prompt[:40] for prompt in tiny.random_prompts(draw, 12)]
    plain = run(NaiveEngine(loaded), tiny.plan_of(prompts, (asked,)))
    params = opened(asked, opening)
    assert params.max_new_tokens + len(params.opening) == asked.max_new_tokens
    assert params.without_opening() == asked
    flat, lengths = append_openings(
        np.concatenate([np.array(p, np.uint32) for p in prompts]),
        np.array([len(p) for p in prompts]),
        [params] * len(prompts),
    )
    longer = [part.tolist() for part in np.split(flat, np.cumsum(lengths)[:-1])]
    plan = tiny.plan_of(longer, (params,))
    for engine in (PrefixEngine(loaded, EngineSettings()), NaiveEngine(loaded)):
        done = run(engine, plan)
        by_row = {int(plan.sequences.row[s]): c for s, c in done.items()}
        same = tiny.plan_of(prompts, (asked,))
        for sequence, completion in plain.items():
            other = by_row[int(same.sequences.row[sequence])]
            assert (*params.opening, *other.token_ids) == completion.token_ids
            assert other.finish_reason == completion.finish_reason


def test_an_opening_leaves_a_token_to_be_said() -> None:
    asked = SamplingParams(max_new_tokens=3, constraint="x")
    assert opened(asked, (7, 8, 9, 10)).opening == (7, 8)
    assert opened(replace(asked, max_new_tokens=1), (7, 8)).opening == ()


def test_a_grammar_that_no_token_can_continue_fails_its_row_alone() -> None:
    dead = json.dumps({"next": [{"9": 1, "10": 1}, {}], "ends": []})
    params = (replace(GREEDY, constraint=dead), GREEDY)
    plan, loaded = tiny.plan_of([[9, 10], [9, 11], [9, 12]], params, [0, 1, 0]), tiny.load_tiny()
    free = run(NaiveEngine(loaded), tiny.plan_of([[9, 11]]))
    for engine in (PrefixEngine(loaded, EngineSettings()), NaiveEngine(loaded)):
        done = run(engine, plan)
        kinds = {int(plan.sequences.row[s]): c.error_type for s, c in done.items()}
        assert kinds == {0: "ConstraintFault", 1: None, 2: "ConstraintFault"}
        told = next(c.error_message for c in done.values() if c.error_type)
        assert told == "no token may follow here by what the answer must be at output token 2"
        (answer,) = (c for c in done.values() if not c.error_type)
        assert answer.token_ids[:5] == free[0].token_ids[:5]


@pytest.mark.parametrize("engine", ["prefix", "naive"])
def test_an_end_of_text_comes_only_where_the_grammar_allows_it(engine: str) -> None:
    """The model would end at once; it must say a whole word first."""
    loaded = tiny.load_tiny()
    head = loaded.model.get_output_embeddings()
    with torch.no_grad():
        head.weight[EOS] = 0
        head.bias = torch.nn.Parameter(torch.zeros(tiny.VOCABULARY))
        head.bias[EOS] = 1e4
    word = json.dumps({"next": [{"9": 1, "8": 1}, {"10": 2, "11": 2}, {"12": 2}], "ends": [2]})
    params = replace(GREEDY, constraint=word)
    chosen: PrefixEngine | NaiveEngine = NaiveEngine(loaded)
    if engine == "prefix":
        chosen = PrefixEngine(loaded, EngineSettings(kernels="torch"))
    (done,) = run(chosen, tiny.plan_of([[9, 10]], (params,))).values()
    assert done.token_ids[-1] == EOS and len(done.token_ids) == 3
    assert done.finish_reason == "stop"
    (on,) = run(chosen, tiny.plan_of([[9, 10]], (replace(params, ignore_eos=True),))).values()
    assert EOS not in on.token_ids and on.finish_reason == "length"


def test_a_complete_answer_ends_without_an_end_of_text() -> None:
    word = json.dumps({"next": [{"9": 1, "8": 1}, {"10": 2, "11": 2}, {}], "ends": [2]})
    for most, reason in ((24, "stop"), (2, "stop"), (1, "length")):
        params = replace(GREEDY, constraint=word, max_new_tokens=most)
        for engine in (PrefixEngine(tiny.load_tiny(), EngineSettings()),
                       NaiveEngine(tiny.load_tiny())):  # fmt: skip
            (done,) = run(engine, tiny.plan_of([[9, 10]], (params,))).values()
            assert (len(done.token_ids), done.finish_reason) == (min(2, most), reason)


def test_a_stop_string_ends_a_forced_run_in_its_middle() -> None:
    chain = {
        "next": [{"8": 1, "9": 1}, {"20": 2}, {"21": 3}, {"22": 4}, {"23": 5}, {}],
        "ends": [5],
    }
    params = replace(GREEDY, constraint=json.dumps(chain), stop=("x",))
    control = RunControl(is_stopped=lambda ids, stop, prompt: ids[-1] == 21, grammars=Automata())
    plan = tiny.plan_of([[9, 10]], (params,))
    for engine in (PrefixEngine(tiny.load_tiny(), EngineSettings()), NaiveEngine(tiny.load_tiny())):
        (done,) = engine.generate(plan, np.arange(1), control)
        assert done.token_ids[1:] == (20, 21) and done.finish_reason == "stop"


@pytest.mark.parametrize("evictor", ["none", "oldest"])
def test_each_turn_of_a_conversation_is_held_to_the_grammar(evictor: str) -> None:
    draw = random.Random(3)
    talks = conversation_plan.random_talks(draw, 8)
    params = SamplingParams(max_new_tokens=12, constraint=draw_constraint(draw))
    eviction = conversation_plan.NONE
    if evictor != "none":
        eviction = replace(eviction, evictor=evictor, budget_tokens=64, window=256)  # type: ignore[arg-type]
    plan = conversation_plan.plan_of(talks, params, eviction)
    loaded = tiny.load_tiny()
    engine = PrefixEngine(loaded, EngineSettings(max_rows=3))
    control = RunControl(grammars=Automata())
    done = list(engine.generate(plan, np.arange(len(plan.sequences)), control))
    assert len(done) == sum(map(len, talks))
    assert engine.counters.forced_tokens == 0
    for completion in done:
        assert completion.finish_reason in ("stop", "length"), completion
        if completion.finish_reason == "stop":
            assert accepts(params.constraint, completion.token_ids)
    if evictor == "none":
        plain = list(NaiveEngine(loaded).generate(plan, np.arange(len(plan.sequences)), control))
        said = {(c.sequence, c.turn): c.token_ids for c in plain}
        assert said == {(c.sequence, c.turn): c.token_ids for c in done}


def test_masks_of_a_step_are_made_together() -> None:
    params = replace(GREEDY, constraint=anything(), ignore_eos=True, max_new_tokens=10)
    plan = tiny.plan_of([[9, i] for i in range(10, 40)], (params,))
    grammars = Automata()
    engine = PrefixEngine(tiny.load_tiny(), EngineSettings())
    run(engine, plan, grammars)
    assert grammars.num_fills <= engine.counters.num_forwards + 31  # and once a row at its end


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 12), st.integers(1, 40))
def test_thinking_ends_within_its_budget_and_the_grammar_begins_after_it(
    seed: int, budget: int, length: int
) -> None:
    draw, tags = random.Random(seed), Thinks()
    grammars = Automata(tags)
    constraint = draw_constraint(draw)
    params = SamplingParams(max_new_tokens=length, constraint=constraint, thinking_budget=budget)
    guide = Guide(grammars, params, [9, *tags.begin_ids], frozenset({EOS}))
    said: list[int] = []
    prepare(grammars, [guide], tiny.VOCABULARY)
    while len(said) < length and not guide.is_over:
        assert guide.mask is not None
        bits = np.unpackbits(guide.mask.view(np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits[: tiny.VOCABULARY])
        assert len(allowed)
        said.append(int(draw.choice(allowed.tolist())))
        if said[-1] == EOS:
            break
        guide.accept(said[-1])
        prepare(grammars, [guide], tiny.VOCABULARY)
    assert guide.fault is None
    ends = [i for i in range(len(said) - 1) if tuple(said[i : i + 2]) == tags.end_ids]
    if length >= budget + 2:
        assert ends and ends[0] <= budget
    if guide.is_over or (said and said[-1] == EOS):
        assert accepts(constraint, said[ends[0] + 2 :])


def test_a_model_may_think_or_answer_at_once_where_the_prompt_says_nothing() -> None:
    grammars = Automata(Thinks())
    word = json.dumps({"next": [{"9": 1}, {}], "ends": [1]})
    params = SamplingParams(constraint=word, thinking_budget=3)
    for first, rest in ((9, []), (5, [50, 51, 52, 6, 7, 9])):
        guide = Guide(grammars, params, [20], frozenset({EOS}))
        prepare(grammars, [guide], tiny.VOCABULARY)
        assert guide.mask is not None
        bits = np.unpackbits(guide.mask.view(np.uint8), bitorder="little")
        assert np.flatnonzero(bits).tolist() == [5, 9]
        for token in (first, *rest):
            guide.accept(token)
            prepare(grammars, [guide], tiny.VOCABULARY)
        assert guide.fault is None and guide.is_over


def test_a_wrong_token_of_a_tag_is_a_fault() -> None:
    params = SamplingParams(thinking_budget=0)
    guide = Guide(Automata(Thinks()), params, [5], frozenset({EOS}))
    assert guide.forced() == [6, 7]
    guide.accept(8)
    assert guide.fault is not None


@pytest.mark.parametrize("budget", [0, 1, 6])
def test_engines_force_the_end_of_thinking(budget: int) -> None:
    draw, grammars = random.Random(1), Automata(Thinks())
    constraint = draw_constraint(draw)
    params = (
        replace(GREEDY, thinking_budget=budget, constraint=constraint),
        replace(GREEDY, thinking_budget=budget, ignore_eos=True),
    )
    prompts = [[20 + i, 5] for i in range(8)]
    plan, loaded = tiny.plan_of(prompts, params, [i % 2 for i in range(8)]), tiny.load_tiny()
    ours = run(PrefixEngine(loaded, EngineSettings()), plan, grammars)
    plain = run(NaiveEngine(loaded), plan, grammars)
    for sequence, completion in plain.items():
        said = ours[sequence].token_ids
        assert said == completion.token_ids
        assert any(said[i : i + 2] == (6, 7) for i in range(budget + 1))


def test_a_tag_opens_the_thinking_at_the_end_of_a_prompt_alone() -> None:
    """What a person has written into a prompt frees no answer from its form."""
    word = json.dumps({"next": [{"20": 1}, {}], "ends": [1]})
    params = SamplingParams(constraint=word)

    def is_free(*prompt: int) -> bool:
        return Guide(Automata(Thinks()), params, prompt, frozenset({EOS})).forced() == []

    assert is_free(1, 5) and is_free(1, 5, 8, 8)
    assert not is_free(1, 5, 2) and not is_free(5, 6, 7) and not is_free(1, 2)


def test_a_budget_holds_where_blanks_stand_before_the_tag() -> None:
    guide = Guide(Automata(Thinks()), SamplingParams(thinking_budget=1), [1], frozenset({EOS}))
    for token_id in (8, 8, 5, 30):
        assert guide.forced() == []
        guide.accept(token_id)
    assert guide.forced() == [6, 7]


@pytest.mark.parametrize("seed", sweep(range(4), (0, 1)))
def test_the_baseline_replays_under_the_same_masks(seed: int) -> None:
    plan, loaded, grammars = random_plan(seed), tiny.load_tiny(), Automata()
    done = run(PrefixEngine(loaded, EngineSettings()), plan)
    baseline = NaiveEngine(loaded, grammars=grammars)
    eos = frozenset({EOS})
    for sequence, completion in done.items():
        params = plan.params_of(sequence)
        prompt = plan.prompt_token_ids(sequence).tolist()
        key = plan.noise_key_of(sequence)
        replay = baseline.replay(prompt, completion.token_ids, params, key)
        assert tuple(replay.predicted.tolist()) == completion.token_ids
        if params.is_greedy and params.constraint:
            assert baseline.generate_one(prompt, params) == completion.token_ids
            at = over_at(grammars, params, prompt, completion.token_ids, eos)
            ended = completion.finish_reason == "stop" and completion.token_ids[-1] != EOS
            assert (at == len(completion.token_ids)) == ended


def test_an_engine_that_holds_to_nothing_says_so() -> None:
    plan = tiny.plan_of([[9]], (replace(GREEDY, constraint=anything()),))
    with pytest.raises(EngineError, match="--engine prefix"):
        EngineCapabilities().check(plan, NO_HOOKS)
