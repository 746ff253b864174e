"""Rows over documents at any position, by the engine, against a slow forward of each row alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.engine import live, scheduler
from pipeline.engine.backend import Backend
from pipeline.engine.base import RunControl
from pipeline.engine.counters import EngineCounters
from pipeline.engine.forward import TransformersForward
from pipeline.engine.kernels.torch_kernel import TorchKernel
from pipeline.engine.layout import DocumentLayout
from pipeline.engine.packing import PlacedSlots, SeenDocuments, document_spans
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.engine.soft_rows import SoftRows, add_soft_rows
from pipeline.engine.verify.segment_reference import SegmentReference
from pipeline.errors import ModelError
from pipeline.plan.document_rows import with_documents
from pipeline.plan.documents import Reuse
from pipeline.plan.plan import Plan, build_plan
from pipeline.plan.segment_table import Segments
from pipeline.plan.token_table import TokenTable
from pipeline.records import SamplingParams
from pipeline.settings import EngineSettings
from tests.engine import families, tiny
from tests.engine.families import FAMILIES, Family

Row = list[list[int]]
"""Preamble, documents, question."""
PARAMS = (
    SamplingParams(max_new_tokens=5, ignore_eos=True),
    SamplingParams(max_new_tokens=70, ignore_eos=True),
)


def random_rows(draw: random.Random, rows: int = 8) -> list[Row]:
    """Documents in other orders, some that begin alike, some twice in a row, none at all."""

    def ids(length: int) -> list[int]:
        return [draw.randrange(4, tiny.VOCABULARY) for _ in range(length)]

    preambles = [ids(9), ids(4), []]
    documents = [ids(draw.randrange(1, 25)) for _ in range(5)]
    documents += [documents[0][:5] + ids(7), documents[1] + ids(3)]
    return [
        [
            draw.choice(preambles),
            *draw.choices(documents, k=draw.choice([0, 1, 2, 3, 4])),
            ids(draw.randrange(1, 9)),
        ]
        for _ in range(rows)
    ]


def plan_rows(rows: list[Row], reuse: Reuse, params: list[int] | None = None) -> Plan:
    table = TokenTable.from_lists([[i for part in row for i in part] for row in rows])
    segments = Segments.from_lists([[len(part) for part in row] for row in rows])
    ids, chosen = [str(i) for i in range(len(rows))], np.array(params or [0] * len(rows))
    plan = build_plan(table, ids, PARAMS, chosen, kind_of_row=segments.kinds())
    return with_documents(plan, segments, reuse, np.zeros(len(rows), np.int64))


def engine_of(family: str = "llama", **settings: object) -> PrefixEngine:
    loaded = tiny.load_tiny(family)
    forward = TransformersForward(loaded.model, pack_weights=False)
    backend = Backend(forward, TorchKernel(torch.device("cpu")))
    return PrefixEngine(loaded, EngineSettings(**settings), backend)  # type: ignore[arg-type]


REUSES = [
    Reuse("concat", tiny.VOCABULARY),
    Reuse("concat", tiny.VOCABULARY, is_below_preamble=False),
    Reuse("epic", tiny.VOCABULARY, True, 3),
    Reuse("epic", tiny.VOCABULARY, False, 40),
    Reuse("kvlink", tiny.VOCABULARY, False, 0, 2),
    Reuse("packet", tiny.VOCABULARY, False, 0, 3),
    Reuse("packet", tiny.VOCABULARY, True, 0, 1),
    Reuse("cacheblend", tiny.VOCABULARY, True, blend_share=0.3),
    Reuse("cacheblend", tiny.VOCABULARY, False, blend_share=0.15),
]


def check(engine: PrefixEngine, rows: list[Row], reuse: Reuse, soft: Tensor | None) -> None:
    """Every logit that chose a token, against the reference's for that row alone."""
    plan = plan_rows(rows, reuse)
    hooks, seen = tiny.watch_logits()
    every = np.arange(len(plan.sequences))
    done = list(engine.generate(plan, every, RunControl(), hooks))
    assert len(done) == len(every) and not any(c.error_type for c in done)
    assert plan.documents is not None
    assert engine.counters.prefilled_tokens == plan.documents.tokens_to_compute(every)
    needed = int((plan.documents.prompt_ends + plan.documents.repaired_tokens).sum())
    cached = sum(completion.cached_tokens for completion in done)
    assert cached == needed - engine.counters.prefilled_tokens
    plain = engine.loaded.model.get_input_embeddings()
    reference = SegmentReference(engine.loaded.model, reuse, soft)
    for completion in done:
        row = rows[int(plan.sequences.row[completion.sequence])]
        segments = [np.array(part, np.int64) for part in row]
        if isinstance(plain, SoftRows):
            engine.loaded.model.set_input_embeddings(plain.plain)
        expected = reference.forced_logits(segments, completion.token_ids)
        engine.loaded.model.set_input_embeddings(plain)
        got = torch.stack([seen[completion.sequence, i] for i in range(len(expected))])
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert torch.equal(got.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("reuse", REUSES, ids=str)
def test_every_mode_is_what_the_slow_reference_computes(reuse: Reuse) -> None:
    engine = engine_of()
    soft = torch.randn(reuse.soft_rows, 64) if reuse.soft_rows else None
    if soft is not None:
        add_soft_rows(engine.loaded.model, soft.numpy(), tiny.VOCABULARY)
    check(engine, random_rows(random.Random(1)), reuse, soft)


ROTARY = [family for family in FAMILIES if family.model_type not in ("gpt2", "opt")]


@pytest.mark.parametrize("family", families.some_quick(ROTARY), ids=lambda family: family.id)
def test_every_family_sees_documents_where_they_stand(family: Family) -> None:
    """By the kernels of this machine."""
    engine = PrefixEngine(families.load(family), EngineSettings())
    rows = random_rows(random.Random(2), 4)
    check(engine, rows, Reuse("epic", engine.loaded.shape.vocabulary_size, True, 2), None)


def test_learned_positions_are_refused() -> None:
    plan = plan_rows(random_rows(random.Random(0)), REUSES[0])
    with pytest.raises(ModelError, match="no rotary positions"):
        list(engine_of("gpt2").generate(plan, np.arange(len(plan.sequences)), RunControl()))


@pytest.mark.parametrize("reuse", [*REUSES[1:4], REUSES[-2]], ids=str)
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_any_budget_and_batch_gives_the_same_answers(
    seed: int, reuse: Reuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spans give way and come back, rows are preempted between documents, prompts are cut."""
    monkeypatch.setattr(live, "FIRST_NEW_TOKENS", 3)
    monkeypatch.setattr(scheduler, "BLOCK_TOKENS", 5)
    draw = random.Random(seed)
    rows = random_rows(draw, 8)
    plan = plan_rows(rows, reuse, [draw.randrange(2) for _ in rows])
    every = np.arange(len(plan.sequences))
    assert plan.documents is not None
    expected, free = answers(engine_of(), plan)
    assert free.recomputed_tokens == 0
    choose = None if reuse.mode != "cacheblend" else lambda *_: np.zeros(0, np.int64)
    needs = DocumentLayout(plan, plan.documents, every, choose)
    smallest = max(
        sum(part.end - part.start for part in needs.of(s).shared)
        + needs.of(s).end - needs.of(s).position + int(plan.max_new_tokens[s]) - 1
        for s in every.tolist()
    )  # fmt: skip
    bytes_per_token = engine_of().loaded.shape.kv_bytes_per_token("float32")
    for slots in (smallest, smallest * 3 // 2):
        engine = engine_of(
            kv_budget=slots * bytes_per_token,
            max_rows=draw.choice([3, 256]),
            max_batch_tokens=draw.choice([16, 4096]),
        )
        found, counters = answers(engine, plan)
        assert found == expected
        assert counters.prefilled_tokens == plan.documents.tokens_to_compute(every)
        assert counters.recomputed_tokens > 0


def answers(engine: PrefixEngine, plan: Plan) -> tuple[dict[int, tuple[int, ...]], EngineCounters]:
    every = np.arange(len(plan.sequences))
    done = list(engine.generate(plan, every, RunControl()))
    assert not any(completion.error_type for completion in done)
    return {c.sequence: c.token_ids for c in done}, engine.counters


def test_what_many_rows_see_is_placed_once() -> None:
    """It is placed anew whenever a row ends. Seen red: once a use, 40 ms for 256 rows of ten."""
    asked: list[int] = []

    def seen(*looks: tuple[int, int, int]) -> SeenDocuments:
        """Of (part, first, shift)."""
        part, first, shift = np.array(looks, np.int64).reshape(-1, 3).T

        def slots(number: int) -> tuple[PlacedSlots, ...]:
            asked.append(number)
            key, low = int(part[number]), int(first[number])
            return (PlacedSlots(10 * key, 10 * key + 10 - low, low),)

        return SeenDocuments(np.stack([part, first], 1), shift, slots)

    rows = [seen((2, 0, 5), (1, 0, 7)), seen((1, 0, 3), (2, 4, 9)), seen(), seen((2, 0, 1))]
    found = document_spans(rows, [(0, 2), (2, 3), (3, 4), (4, 5)])
    assert found is not None
    assert found.spans.tolist() == [[5, 8, 10, 20, 0], [8, 11, 20, 30, 0], [11, 12, 20, 26, 4]]
    assert found.owner.tolist() == [0, 1, 2, 0, 1, 4, 2]
    assert found.shift.tolist() == [7, 7, 3, 5, 5, 1, 9]
    assert len(asked) == 3
    assert document_spans([seen(), seen()], [(0, 1), (1, 2)]) is None
