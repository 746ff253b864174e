"""The study's batched modes: as the slow reference says, and equal where they must be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.engine.verify.segment_reference import SegmentReference
from pipeline.plan.documents import Mode, Reuse
from pipeline.segments.assembled import Assembler
from pipeline.segments.blend import run_blend
from pipeline.segments.sam_kv import Thinning, run_sam_kv
from pipeline.segments.tasks import VOCABULARY
from tests.segments.rows import ALL, arranged, build_llama, difference, draw_segments, full_logits

ROWS = draw_segments()
SOFT = torch.randn(240, 64, generator=torch.Generator().manual_seed(2))
MODES: list[tuple[Mode, bool, dict[str, int]]] = [
    ("concat", True, {}),
    ("concat", False, {}),
    ("epic", True, {"epic_tokens": 3}),
    ("epic", False, {"epic_tokens": 3}),
    ("kvlink", False, {"soft_tokens": 2}),
    ("packet", False, {"soft_tokens": 2}),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return build_llama()


def run(model: Any, mode: Mode, below: bool = True, **options: int) -> Tensor:
    assembler = Assembler(model, SOFT if "soft_tokens" in options else None)
    return assembler.run(assembler.assemble(arranged(ROWS, mode, below, **options)))


def blend(model: Any, share: float, random: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    assembler = Assembler(model)
    copied = assembler.assemble(arranged(ROWS, "concat", True))
    repaired = arranged(ROWS, "epic", True, epic_tokens=ALL)
    return run_blend(assembler, copied, repaired, share, random)


@pytest.mark.parametrize(("mode", "below", "options"), MODES, ids=str)
def test_a_batch_equals_the_slow_reference(
    model: Any, mode: Mode, below: bool, options: dict[str, int]
) -> None:
    reuse = Reuse(mode, VOCABULARY, below, **options)
    reference = SegmentReference(model, reuse, SOFT if "soft_tokens" in options else None)
    expected = torch.cat([reference.forced_logits(row, [0]) for row in ROWS])
    assert difference(run(model, mode, below, **options), expected) < 1e-5


def test_all_repaired_is_full_prefill(model: Any) -> None:
    full = full_logits(model, ROWS)
    assert difference(run(model, "epic", epic_tokens=ALL), full) < 1e-5
    assert difference(blend(model, 1.0)[0], full) < 1e-5
    assert difference(run(model, "concat"), full) > 0.05


def test_nothing_repaired_is_concat(model: Any) -> None:
    concat = run(model, "concat")
    assert torch.equal(run(model, "epic", epic_tokens=0), concat)
    assert torch.equal(run(model, "kvlink", soft_tokens=0), concat)
    assert torch.equal(run(model, "packet", soft_tokens=0), concat)
    assert difference(blend(model, 0.0)[0], concat) < 1e-5


def test_one_document_below_the_preamble_is_full_prefill(model: Any) -> None:
    rows = [[row[0], row[1], row[-1]] for row in ROWS]
    assembler = Assembler(model)
    got = assembler.run(assembler.assemble(arranged(rows, "concat", True)))
    assert difference(got, full_logits(model, rows)) < 1e-5


def test_blend_repairs_its_share_and_chooses_well(model: Any) -> None:
    full, concat = full_logits(model, ROWS), run(model, "concat")
    chosen, count = blend(model, 0.3)
    drawn, drawn_count = blend(model, 0.3, torch.Generator().manual_seed(0))
    tokens = [sum(map(len, row[2:-1])) for row in ROWS]
    assert count.tolist() == drawn_count.tolist() == [round(0.3 * n) for n in tokens]

    def distance(logits: Tensor) -> float:
        return float((logits - full).square().mean())

    assert distance(chosen) < distance(drawn) < 1.5 * distance(concat)


@pytest.mark.parametrize("share", [0.1, 0.3, 1.0])
def test_the_blend_of_the_engine_is_that_of_the_study(model: Any, share: float) -> None:
    """Chosen by two programs: through hooks of whole models, and layer by layer in a batch."""
    reuse = Reuse("cacheblend", VOCABULARY, True, blend_share=share)
    reference = SegmentReference(model, reuse)
    expected = torch.cat([reference.forced_logits(row, [0]) for row in ROWS])
    assert difference(blend(model, share)[0], expected) < 1e-5


def test_no_turn_and_a_wrong_turn_are_seen(model: Any) -> None:
    assembler = Assembler(model)
    rows = arranged(ROWS, "concat", True)
    unturned = assembler.run(assembler.assemble(rows, turns=False))
    assert difference(unturned, run(model, "concat")) > 0.05


def test_sam_kv_with_nothing_dropped_or_mixed_in_is_full_prefill(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.segments.sam_kv._NEW", 1.0)
    assembler = Assembler(model)
    rows = arranged(ROWS, "concat", False)
    got, count = run_sam_kv(assembler, assembler.assemble(rows), rows, Thinning(ALL, 0, 1, 2))
    assert difference(got, full_logits(model, ROWS)) < 1e-5
    assert count.tolist() == [sum(map(len, row[1:-1])) for row in ROWS]


def test_sam_kv_keeps_the_ends_and_some_blocks(model: Any) -> None:
    assembler = Assembler(model)
    rows = arranged(ROWS, "concat", False)
    got, count = run_sam_kv(assembler, assembler.assemble(rows), rows, Thinning(2, 4, 2, 2))
    assert torch.isfinite(got).all()
    tokens = [sum(map(len, row[1:-1])) for row in ROWS]
    for row, kept, all_tokens in zip(ROWS, count.tolist(), tokens, strict=True):
        assert 6 * len(row[1:-1]) <= kept <= all_tokens
    assert int(count.sum()) < sum(tokens)


@pytest.mark.parametrize(("mode", "below", "options"), MODES, ids=str)
def test_no_position_stands_twice(mode: Mode, below: bool, options: dict[str, int]) -> None:
    for row in arranged(ROWS, mode, below, **options):
        at = [np.arange(len(row.preamble))]
        at += [np.arange(use.first, len(use.path)) + use.shift for use in row.uses]
        at += [np.arange(run.position, run.position + len(run.token_ids)) for run in row.runs]
        positions = np.sort(np.concatenate(at))
        assert np.array_equal(positions, np.arange(len(positions)))
