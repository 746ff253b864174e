"""Recorded decode steps on the CPU: all but the graph itself, which is a direct call here."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.engine.cuda_graphs import (
    DecodeRunner,
    NextTokens,
    Recorder,
    round_up,
)
from pipeline.engine.kernels.rules import AttentionRules, attend_reference
from pipeline.engine.kernels.triton_kernel import TritonKernel
from pipeline.engine.kernels.work_items import WorkShape
from pipeline.engine.packing import PackedBatch
from pipeline.engine.recordings import choose_recorder
from pipeline.engine.step_memory import DecodeStep

ROWS, SHARED, STEPS, VOCABULARY, HEAD_DIM = 11, 30, 9, 23, 4
SCRATCH = SHARED + ROWS * STEPS


class DirectCall:
    """In place of a CUDA graph: repeats the work by calling it again."""

    def __init__(self) -> None:
        self.num_recorded = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        self.num_recorded += 1
        return work


class RefusesToRecord:
    """As CUDA does when a model waits for the device within its forward."""

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")


class ToyModel:
    """One layer of attention over its own arena; `seen` are the batches that it was given."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.table = torch.randn(3, VOCABULARY, 2, HEAD_DIM, generator=draw)
        self.arena = torch.randn(2, 2, SCRATCH + 1, HEAD_DIM, generator=draw)
        self.head = torch.randn(2 * HEAD_DIM, VOCABULARY, generator=draw)
        self.seen: list[PackedBatch] = []

    def __call__(self, batch: PackedBatch) -> Tensor:
        self.seen.append(batch)
        assert torch.equal(batch.position_ids[0], batch.work.positions[: len(batch.slots)])
        query, key, value = self.table[:, batch.input_ids[0]]
        self.arena[0][:, batch.slots] = key.transpose(0, 1)
        self.arena[1][:, batch.slots] = value.transpose(0, 1)
        items = torch.cat([batch.work.large, batch.work.small])[:, :5].numpy()
        rules = AttentionRules(0.5)
        out = attend_reference(
            query, self.arena[0], self.arena[1], batch.position_ids[0], items, rules
        )
        return out.flatten(1) @ self.head


def decode(model: ToyModel, record: Recorder | None) -> tuple[DecodeRunner, list[NextTokens]]:
    """STEPS tokens of rows that share a prefix and leave one by one, each step fed by the last."""
    runner = DecodeRunner(model, TritonKernel(2, 2, torch.device("cpu")), SCRATCH, record)
    token_ids = np.arange(ROWS)
    results = []
    for step in range(STEPS):
        rows = np.arange(ROWS - step)
        low = SHARED + rows * STEPS
        own = np.stack([rows, rows + 1, low, low + step + 1, rows * 0 + SHARED], 1)
        spans = np.concatenate([[[0, len(rows), 0, SHARED, 0]], own])
        fed = DecodeStep(token_ids[: len(rows)], rows * 0 + SHARED + step, low + step, spans)
        token_ids = runner(fed).greedy.token_ids
        results.append(runner(fed))  # writing the same KV twice changes nothing
        assert results[-1].greedy.is_finite.all() and len(token_ids) == len(rows)
    return runner, results


def test_recorded_steps_equal_plain_ones() -> None:
    plain_model, model, record = ToyModel(), ToyModel(), DirectCall()
    plain, recorded = decode(plain_model, None)[1], decode(model, record)[1]
    for a, b in zip(plain, recorded, strict=True):
        assert a.greedy.token_ids.tolist() == b.greedy.token_ids.tolist()
        assert len(b.logits) == len(b.greedy.token_ids)
    used = slice(0, SCRATCH)  # padding writes to the scratch slot alone
    assert torch.equal(plain_model.arena[:, :, used], model.arena[:, :, used])
    assert len({tuple(r.greedy.token_ids.tolist()) for r in plain}) > 5, (
        "the model says one thing only"
    )


def test_a_bucket_is_recorded_once_and_keeps_its_memory() -> None:
    model, record = ToyModel(), DirectCall()
    decode(model, record)
    shapes = {b.work.shape for b in model.seen}
    addresses = {(b.input_ids.data_ptr(), b.slots.data_ptr(), b.work.large.data_ptr())
                 for b in model.seen}  # fmt: skip
    assert {s.tokens for s in shapes} == {8, 12}
    assert len(addresses) == record.num_recorded == len(shapes)


def test_without_a_recorder_nothing_is_padded() -> None:
    model = ToyModel()
    decode(model, None)
    assert {len(b.slots) for b in model.seen} == set(range(ROWS - STEPS + 1, ROWS + 1))
    assert choose_recorder(torch.device("cpu")) is None


def test_a_model_that_cannot_be_recorded_still_decodes_and_a_person_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen red: a note on the runner that nobody read."""
    monkeypatch.setattr(logging.getLogger("coppice"), "propagate", True)
    runner, results = decode(ToyModel(), RefusesToRecord())
    plain = decode(ToyModel(), None)[1]
    assert [r.greedy.token_ids.tolist() for r in results] == [
        r.greedy.token_ids.tolist() for r in plain
    ]
    reason = "operation not permitted when stream is capturing"
    # pytest hears a logger that did not propagate twice once it does: the same record, not two.
    records = {id(record): record for record in caplog.records}.values()
    said = [record.getMessage() for record in records]
    assert said == [f"decoding without CUDA graphs: {reason}"]
    assert not runner.is_recording


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_told(bad: float) -> None:
    model = ToyModel()
    model.arena[:, :, SHARED + STEPS] = bad  # of row 1 alone
    runner = DecodeRunner(model, TritonKernel(2, 2, torch.device("cpu")), SCRATCH, DirectCall())
    rows = np.arange(3)
    low = SHARED + rows * STEPS
    own = np.stack([rows, rows + 1, low, low + 2, rows * 0], 1)
    fed = DecodeStep(rows, rows * 0 + 1, low + 1, own)
    assert runner(fed).greedy.is_finite.tolist() == [True, False, True]


class EndsInMemory:
    """As CUDA does when no more can be allocated while a step is recorded."""

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_memory_that_ends_in_a_recording_is_the_callers_to_mend() -> None:
    """Seen red: taken for a step that cannot be recorded, and nothing was recorded any more."""
    with pytest.raises(torch.OutOfMemoryError):
        decode(ToyModel(), EndsInMemory())


def test_a_failed_recording_is_among_the_engines_notes() -> None:
    notes: list[str] = []
    kernel = TritonKernel(2, 2, torch.device("cpu"))
    runner = DecodeRunner(ToyModel(), kernel, SCRATCH, RefusesToRecord(), notes)
    rows = np.arange(3)
    low = SHARED + rows * STEPS
    own = np.stack([rows, rows + 1, low, low + 1, rows * 0], 1)
    for _ in range(3):
        runner(DecodeStep(rows, rows * 0, low, own))
    assert notes == [
        "decoding without CUDA graphs: operation not permitted when stream is capturing"
    ]


CARD = TritonKernel(32, 8, torch.device("cpu"))
CARD._programs, CARD.items_aimed_at = 528, 66  # as on an H100


@given(st.tuples(*[st.integers(0, 3000)] * 3))
def test_a_bucket_holds_the_shape_with_little_padding(sizes: tuple[int, int, int]) -> None:
    tokens, large, small = sizes
    partials = large * 16 + small * 4  # the most that so many items can give
    shape = WorkShape(tokens, large, small, partials)
    bucket = round_up(shape, CARD)
    assert round_up(bucket, CARD) == bucket
    assert (bucket.large == 0) == (shape.large == 0)
    for name in ("tokens", "large", "small", "partials"):
        assert getattr(shape, name) <= getattr(bucket, name)
    assert bucket.tokens <= max(8, shape.tokens * 3 // 2)


@pytest.mark.parametrize("shared", [1000, 16_000])
def test_a_job_whose_rows_end_one_by_one_is_recorded_once_a_number_of_tokens(shared: int) -> None:
    """Seen red: 20 sizes, since items and partials were rounded for themselves."""
    seen = set()
    for live in range(256, 0, -1):
        rows = np.arange(live)
        length = 128 + (256 - live) // 2
        low = shared + rows * 400
        own = np.stack([rows, rows + 1, low, low + length, rows * 0 + shared], 1)
        spans = np.concatenate([[[0, live, 0, shared, 0]], own])
        work = CARD.plan(spans, rows * 0 + shared + length - 1)
        seen.add(round_up(work.shape, CARD))
    tokens = {shape.tokens for shape in seen}
    assert len(tokens) == 11
    assert len(seen) <= len(tokens) + 1  # four rows and fewer have no large tile
