"""Training of packets and links: on the right logits, deterministic, and it helps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.engine.verify.segment_reference import SegmentReference
from pipeline.errors import UsageError
from pipeline.plan.documents import Mode, Reuse
from pipeline.segments.lessons import TrainingRow, group, make_lesson, predict
from pipeline.segments.teacher import answer_greedily, divergence, listen
from pipeline.segments.train_links import LinkSettings, train_links
from pipeline.segments.train_packet import PacketSettings, train_packet
from tests.engine import families, tiny
from tests.engine.families import FAMILIES
from tests.segments.rows import build_llama, draw_segments, full_logits

ANSWERS = ([40, 3], [50], [60, 61, 3], [70, 3], [80])
ROWS = [TrainingRow(*pair) for pair in zip(draw_segments(), ANSWERS, strict=True)]
PACKET = PacketSettings(soft_tokens=2, held_out=4, epochs=3, batch=8, learning_rate=0.05,
                        max_new_tokens=2)  # fmt: skip
LINKS = LinkSettings(soft_tokens=2, held_out=4, steps=12, batch=8, learning_rate=1e-3,
                     max_new_tokens=2)  # fmt: skip


@pytest.fixture
def model() -> Any:
    return build_llama()


def many() -> list[TrainingRow]:
    return [TrainingRow(segments, []) for segments in draw_segments(20)]


def weights(model: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def are_equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(some, others, strict=True))


@pytest.mark.parametrize("family_id", ["llama, grouped heads", "gemma2, soft-capped scores, window "
                                       "in some layers", "mistral, window"])  # fmt: skip
@pytest.mark.parametrize("mode", ["packet", "kvlink"])
def test_lessons_are_what_the_slow_reference_computes(mode: Mode, family_id: str) -> None:
    model: Any = families.build(next(f for f in FAMILIES if f.id == family_id).config())
    reuse = Reuse(mode, tiny.VOCABULARY, False, soft_tokens=2)
    soft = torch.randn(reuse.soft_rows, 64, generator=torch.Generator().manual_seed(1))
    rows = [
        TrainingRow([ids % tiny.VOCABULARY for ids in row.segments], [i + 1 for i in row.answer])
        for row in ROWS
    ]
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        got = predict(model, make_lesson(rows, reuse, "cpu"), soft)
    reference = SegmentReference(model, reuse, soft)
    expected = torch.cat([reference.forced_logits(row.segments, row.answer) for row in rows])
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5


def test_a_plain_lesson_is_full_attention(model: Any) -> None:
    with torch.inference_mode():
        got = predict(model, make_lesson(ROWS, None, "cpu"), None)
    first = np.cumsum([0, *(len(row.answer) for row in ROWS[:-1])])
    expected = full_logits(model, [row.segments for row in ROWS])
    torch.testing.assert_close(got[first], expected, rtol=1e-4, atol=1e-4)


def test_the_teacher_answers_greedily_where_no_answer_is_given(model: Any) -> None:
    asked = [ROWS[0], *(TrainingRow(row.segments, []) for row in ROWS[1:])]
    said = answer_greedily(model, asked, 2, 300)
    assert said[0] == ROWS[0]
    first = full_logits(model, [row.segments for row in ROWS]).argmax(-1).tolist()
    assert [row.answer[0] for row in said[1:]] == first[1:]
    assert {len(row.answer) for row in said[1:]} <= {1, 2}


def test_what_is_said_diverges_from_itself_by_nothing(model: Any) -> None:
    said = listen(model, ROWS, 100)
    with torch.inference_mode():
        logits = predict(model, make_lesson(ROWS[:1], None, "cpu"), None)
    assert float(divergence(said[0], logits).abs().max()) < 1e-4
    assert float(divergence(said[0], logits.roll(1, -1)).min()) > 0.1


def test_groups_keep_order_and_bound() -> None:
    grouped = list(group(ROWS, 200))
    assert [row for some in grouped for row in some] == ROWS
    assert len(grouped) > 1 and sum(map(len, grouped)) == len(ROWS)


def test_a_packet_is_learned_by_a_frozen_model(model: Any) -> None:
    held = weights(model)
    done = train_packet(model, many(), PACKET, lambda _: None)
    assert done.after.kl < done.before.kl and done.rows.shape == (4, 64)
    assert are_equal(held, weights(model))
    again = train_packet(model, many(), replace(PACKET, most_tokens=400), lambda _: None)
    torch.testing.assert_close(again.rows, done.rows, rtol=1e-3, atol=1e-4)
    assert torch.equal(train_packet(model, many(), PACKET, lambda _: None).rows, done.rows)
    other = train_packet(model, many(), replace(PACKET, seed=1), lambda _: None)
    assert not torch.equal(other.rows, done.rows)


def loss(model: Any, soft: Tensor, soft_tokens: int) -> float:
    """Of the answer that `taught` rows give."""
    reuse = Reuse("kvlink", model.config.vocab_size, False, soft_tokens=soft_tokens)
    lesson = make_lesson(taught(), reuse, "cpu")
    with torch.inference_mode():
        return float(functional.cross_entropy(predict(model, lesson, soft), lesson.answers))


def taught() -> list[TrainingRow]:
    return [TrainingRow(row.segments, [50, 3]) for row in many()]


def test_links_alone_are_learned_by_a_frozen_model(model: Any) -> None:
    held = weights(model)
    settings = replace(LINKS, is_frozen=True, learning_rate=0.05)
    done = train_links(model, taught(), settings, lambda _: None)
    assert are_equal(held, weights(model)) and done.drift == 0 and done.rows.shape == (80, 64)
    assert loss(model, done.rows, 2) < loss(model, torch.zeros(80, 64), 2) - 0.1
    assert done.rows[:4].abs().max() > 0.2 > done.rows[20:].abs().max()  # of later documents


def test_a_whole_model_is_trained_with_its_links_or_without(model: Any) -> None:
    for soft_tokens in (2, 0):
        held, untrained = weights(model), loss(model, torch.zeros(80, 64), soft_tokens)
        settings = replace(LINKS, soft_tokens=soft_tokens)
        done = train_links(model, taught(), settings, lambda _: None)
        assert not are_equal(held, weights(model)) and len(done.rows) == 40 * soft_tokens
        assert loss(model, done.rows, soft_tokens) < untrained - 0.1


def test_too_few_rows_are_refused(model: Any) -> None:
    with pytest.raises(UsageError, match="there are 5 rows with documents, and training needs 8"):
        train_packet(model, ROWS, PACKET, lambda _: None)
