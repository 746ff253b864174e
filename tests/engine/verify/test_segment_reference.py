"""The slow reference of all modes, against one forward of the model under a block-diagonal mask.

With documents encoded alone no key has to be turned there: a row is one sequence at its own
positions, and a mask says what is seen. Where a token is computed twice, once in its document and
once by the row, it stands in that sequence twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.engine.verify.segment_reference import Ids, SegmentReference, as_masks
from pipeline.errors import ModelError
from pipeline.plan.documents import Mode, Reuse
from tests.engine import families, tiny
from tests.engine.families import FAMILIES, Family

V = tiny.VOCABULARY
LEARNED = ("gpt2", "opt")
ROTARY = [family for family in FAMILIES if family.model_type not in LEARNED]
DRAW = np.random.default_rng(1)
PREAMBLE, FIRST, SECOND, THIRD, QUESTION = (
    DRAW.integers(4, V, n, dtype=np.int64) for n in (5, 13, 7, 16, 6)
)
NONE = PREAMBLE[:0]
ROW = [PREAMBLE, FIRST, SECOND, THIRD, QUESTION]
OUTPUT = [9, 31, 17]
SOFT = torch.randn(160, 64, generator=torch.Generator().manual_seed(2))


def reference(model: Any, mode: Mode, below: bool, **options: int) -> SegmentReference:
    soft_rows = SOFT if options.get("soft_tokens") else None
    return SegmentReference(model, Reuse(mode, V, below, **options), soft_rows)


def llama() -> Any:
    return families.build(next(f for f in FAMILIES if f.id == "llama, grouped heads").config())


def one_forward(model: Any, pieces: list[tuple[Ids, int, int, int]]) -> Tensor:
    """Logits of the last tokens. A piece: ids, first position, its document (0: seen by all that
    belongs to none), and how many of its first tokens are hidden from those outside."""
    ids = torch.tensor(np.concatenate([piece[0] for piece in pieces]))
    at = torch.cat([torch.arange(first, first + len(i)) for i, first, _, _ in pieces])
    part = torch.cat([torch.full((len(i),), part) for i, _, part, _ in pieces])
    hidden = torch.cat([torch.arange(len(i)) < h for i, _, _, h in pieces])
    age = at[:, None] - at
    sees = (part == part[:, None]) | ((part[:, None] == 0) & ~hidden)
    embedded = model.get_input_embeddings()(ids.clamp(max=V - 1))
    if (ids >= V).any():
        embedded[ids >= V] = SOFT[ids[ids >= V] - V]
    model.set_attn_implementation("eager")
    mask = as_masks(model, age, sees & (age >= 0))
    with torch.inference_mode():
        logits: Tensor = model(
            inputs_embeds=embedded[None],
            position_ids=at[None],
            attention_mask=mask,
            use_cache=False,
        ).logits[0]
    return logits[-len(OUTPUT) :]


def tail(position: int) -> tuple[Ids, int, int, int]:
    return np.concatenate([QUESTION, OUTPUT[:-1]]), position, 0, 0


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape == (len(OUTPUT), V)
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("family", families.some_quick(ROTARY), ids=lambda family: family.id)
def test_documents_alone_equal_a_block_diagonal_mask(family: Family) -> None:
    model = families.build(family.config())
    pieces = [
        (PREAMBLE, 0, 0, 0),
        (FIRST, 5, 1, 0),
        (SECOND, 18, 2, 0),
        (THIRD, 25, 3, 0),
        tail(41),
    ]
    got = reference(model, "concat", below=False).forced_logits(ROW, OUTPUT)
    assert_same(got, one_forward(model, pieces))


def test_epic_alone_equals_a_mask_with_two_copies_of_the_first_tokens() -> None:
    model = llama()
    pieces = [
        (PREAMBLE, 0, 0, 0), (FIRST, 5, 1, 4), (SECOND, 18, 2, 4), (THIRD, 25, 3, 4),
        (FIRST[:4], 5, 0, 0), (SECOND[:4], 18, 0, 0), (THIRD[:4], 25, 0, 0), tail(41),
    ]  # fmt: skip
    got = reference(model, "epic", below=False, epic_tokens=4).forced_logits(ROW, OUTPUT)
    assert_same(got, one_forward(model, pieces))


def test_links_see_what_is_before_them_and_documents_see_no_link() -> None:
    model, links = llama(), V + np.arange(6)
    pieces = [
        (PREAMBLE, 0, 0, 0), (FIRST, 5, 1, 0), (links[:2], 18, 0, 0), (SECOND, 20, 2, 0),
        (links[2:4], 27, 0, 0), (THIRD, 29, 3, 0), (links[4:], 45, 0, 0), tail(47),
    ]  # fmt: skip
    got = reference(model, "kvlink", below=False, soft_tokens=2).forced_logits(ROW, OUTPUT)
    assert_same(got, one_forward(model, pieces))


def test_a_packet_has_the_same_soft_tokens_around_every_document() -> None:
    model, head, end = llama(), V + np.arange(3), V + 3 + np.arange(3)
    pieces, position = [(PREAMBLE, 0, 0, 0)], 5
    for number, document in enumerate(ROW[1:-1]):
        packet = np.concatenate([head, document, end])
        pieces.append((packet, position, number + 1, 0))
        position += len(packet)
    got = reference(model, "packet", below=False, soft_tokens=3).forced_logits(ROW, OUTPUT)
    assert_same(got, one_forward(model, [*pieces, tail(position)]))


Arm = Callable[[Any, bool], SegmentReference]
NOTHING: dict[str, Arm] = {
    "concat": lambda model, below: reference(model, "concat", below),
    "epic 0": lambda model, below: reference(model, "epic", below, epic_tokens=0),
    "kvlink 0": lambda model, below: reference(model, "kvlink", below, soft_tokens=0),
    "packet 0": lambda model, below: reference(model, "packet", below, soft_tokens=0),
}


@pytest.mark.parametrize("below", [True, False])
def test_modes_that_add_nothing_are_one(below: bool) -> None:
    model = llama()
    first, *others = (arm(model, below).forced_logits(ROW, OUTPUT) for arm in NOTHING.values())
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("family", families.some_quick(ROTARY), ids=lambda family: family.id)
def test_what_is_exact_below_the_preamble_is_full_prefill(family: Family) -> None:
    """One document in any mode that adds nothing; several where each row repairs all of them."""
    model = families.build(family.config())
    whole = np.concatenate(ROW)
    for row, options in (([PREAMBLE, FIRST, QUESTION], {}), (ROW, {"epic_tokens": 99})):
        whole = np.concatenate([*row, OUTPUT[:-1]])
        model.set_attn_implementation("eager")
        with torch.inference_mode():
            full = model(torch.tensor(whole)[None], use_cache=False).logits[0, -len(OUTPUT) :]
        assert_same(
            reference(model, "epic", below=True, **options).forced_logits(row, OUTPUT), full
        )


def test_several_documents_are_not_full_prefill() -> None:
    """Else the comparisons above would say nothing; and the context of a document matters."""
    model = llama()
    exact = reference(model, "epic", below=True, epic_tokens=99).forced_logits(ROW, OUTPUT)
    below, alone = (
        reference(model, "concat", below).forced_logits(ROW, OUTPUT) for below in (True, False)
    )
    for other in (below, alone):
        assert float((exact - other).abs().max() / exact.abs().max()) > 0.05
    assert float((below - alone).abs().max() / exact.abs().max()) > 0.05


def test_a_row_may_lack_preamble_or_documents() -> None:
    model = llama()
    for row in ([NONE, FIRST, QUESTION], [PREAMBLE, QUESTION], [NONE, QUESTION]):
        whole = torch.tensor(np.concatenate([*row, OUTPUT[:-1]]))[None]
        with torch.inference_mode():
            full = model(whole, use_cache=False).logits[0, -len(OUTPUT) :]
        assert_same(reference(model, "concat", below=True).forced_logits(row, OUTPUT), full)


def test_generation_takes_the_largest_logit_until_a_stop() -> None:
    made = reference(llama(), "concat", below=True)
    tokens = made.generate(ROW, 4)
    logits = made.forced_logits(ROW, tokens)
    assert tokens == logits.argmax(-1).tolist() and len(tokens) == 4
    assert made.generate(ROW, 4, stops=tokens[1:2]) == tokens[: 1 + tokens.index(tokens[1])]


@pytest.mark.parametrize("model_type", LEARNED)
def test_learned_positions_are_refused_by_name(model_type: str) -> None:
    model = families.build(next(f for f in FAMILIES if f.model_type == model_type).config())
    with pytest.raises(ModelError, match=model_type):
        reference(model, "concat", below=True)
