"""Planted faults: the audit must catch each of them, at its place, and let honest rows pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from pipeline.audit.replay import BARS, AuditInput, Bars, audit_row, find_wrong_end
from pipeline.engine.base import Replay, TokenIds
from pipeline.records import SamplingParams
from tests.audit.rule_model import EOS, VOCABULARY, RuleModel, honest_row

GREEDY = SamplingParams(max_new_tokens=12)
SAMPLED = SamplingParams(max_new_tokens=12, temperature=8.0)
MODEL = RuleModel()
EXACT = BARS["exact"]


def honest_rows(params: SamplingParams) -> list[AuditInput]:
    prompts = [tuple(range(a, a + 5)) for a in range(1, 21)]
    return [honest_row(MODEL, prompt, params, key) for key, prompt in enumerate(prompts)]


def long_row(params: SamplingParams = GREEDY) -> AuditInput:
    return next(row for row in honest_rows(params) if row.finish_reason == "length")


def ended_row(params: SamplingParams = GREEDY) -> AuditInput:
    rows = honest_rows(params)
    return next(row for row in rows if row.finish_reason == "stop" and len(row.output) > 2)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, replace(GREEDY, ignore_eos=True)])
def test_honest_rows_are_identical(params: SamplingParams) -> None:
    audits = [audit_row(MODEL, row, EXACT, free_run=True) for row in honest_rows(params)]
    assert [audit.row_class for audit in audits] == ["identical"] * 20
    assert all(audit.exact and audit.first_divergence is None for audit in audits)
    assert all((audit.free_run is not None) == params.is_greedy for audit in audits)
    assert all(audit.free_run is None or audit.free_run.explained for audit in audits)


def one_token_changed(row: AuditInput) -> AuditInput:
    changed = (row.output[4] + 9) % VOCABULARY or 1
    return replace(row, output=(*row.output[:4], changed, *row.output[5:]))


def ended_early(row: AuditInput) -> AuditInput:
    return replace(row, output=row.output[:-1])


def ended_early_with_false_eos(row: AuditInput) -> AuditInput:
    return replace(row, output=(*row.output[:6], EOS), finish_reason="stop")


def ended_late(row: AuditInput) -> AuditInput:
    context = [*row.prompt, *row.output]
    return replace(row, output=(*row.output, int(MODEL.logprobs(context).argmax())))


def position_shifted(row: AuditInput) -> AuditInput:
    """The engine believed that the prompt was one token longer than it is."""
    context, output = list(row.prompt), []
    for at in range(row.params.max_new_tokens):
        output.append(MODEL.next_token([1, *context], at, row.params, row.noise_key))
        context.append(output[-1])
    return replace(row, output=tuple(output), params=replace(row.params, ignore_eos=True))


def neighbour_s_noise(row: AuditInput) -> AuditInput:
    return replace(row, output=MODEL.write(row.prompt, row.params, row.noise_key + 1))


@pytest.mark.parametrize(
    ("plant", "row", "at"),
    [
        (one_token_changed, long_row(), 4),
        (one_token_changed, long_row(SAMPLED), 4),
        (ended_early, long_row(), 11),
        (ended_early, ended_row(), len(ended_row().output) - 1),
        (ended_early_with_false_eos, long_row(), 6),
        (ended_late, long_row(), 12),
        (ended_late, ended_row(), len(ended_row().output)),
        (position_shifted, long_row(), 0),
        (neighbour_s_noise, long_row(SAMPLED), None),
    ],
)
def test_a_planted_fault_is_caught_where_it_is(
    plant: Callable[[AuditInput], AuditInput], row: AuditInput, at: int | None
) -> None:
    audit = audit_row(MODEL, plant(row), EXACT, free_run=True)
    assert audit.row_class == "corrupt"
    assert audit.first_divergence is not None
    assert at is None or audit.first_divergence == at
    if audit.free_run is not None:
        assert not audit.free_run.explained


@pytest.mark.parametrize(
    ("gap", "bars", "expected"),
    [
        (5e-4, BARS["exact"], "near_tie"),
        (2e-3, BARS["exact"], "drift"),
        (0.1, BARS["16-bit"], "near_tie"),
        (0.2, BARS["16-bit"], "drift"),
        (0.6, BARS["16-bit"], "corrupt"),
    ],
)
def test_the_deficit_at_the_first_difference_decides_the_class(
    gap: float, bars: Bars, expected: str
) -> None:
    model = RuleModel(gap)
    row = honest_row(model, (1, 2, 3), replace(GREEDY, ignore_eos=True))
    second = (row.output[2] + 1) % VOCABULARY
    rest = model.write([*row.prompt, *row.output[:2], second], row.params, 0)[:9]
    audit = audit_row(model, replace(row, output=(*row.output[:2], second, *rest)), bars, True)
    assert (audit.row_class, audit.first_divergence) == (expected, 2)
    assert audit.tokens_checked == 3
    assert audit.deficit == pytest.approx(gap)
    assert audit.free_run is not None
    assert audit.free_run.first_divergence == 2
    assert audit.free_run.explained == (expected == "near_tie")


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("bar", [1e-3, 0.125, 0.5])
def test_the_bar_of_sampled_rows_is_the_mass_that_such_an_error_can_move(
    temperature: float, bar: float
) -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 2, (2000, 8)) / temperature
    errors = rng.choice([-bar / 2, bar / 2], (2000, 8)) / temperature
    mass, moved = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (logits, logits + errors))
    shift = np.abs(mass.cumsum(1) - moved.cumsum(1)).max()
    allowed = Bars(bar).for_params(SamplingParams(temperature=temperature)).near_tie
    assert 0.9 * allowed < shift <= allowed


def test_logits_that_are_not_numbers_are_corrupt() -> None:
    class BrokenModel(RuleModel):
        def replay(
            self,
            prompt: Sequence[int],
            output: Sequence[int],
            params: SamplingParams,
            noise_key: int,
        ) -> Replay:
            nan = np.full(len(output), np.nan)
            return Replay(np.array(output), nan, nan, nan)

    assert audit_row(BrokenModel(), long_row(), EXACT).row_class == "corrupt"


def has_seven_then_eight(token_ids: Sequence[int], stop: tuple[str, ...], prompt: TokenIds) -> bool:
    return (7, 8) in zip(token_ids, token_ids[1:], strict=False)


@pytest.mark.parametrize(
    ("output", "reason", "wrong_at"),
    [
        ((5, 7, 8), "stop", None),
        ((5, 7), "stop", 2),
        ((5, 7, 8, 9), "stop", 3),
        ((5, 7, 8), "length", 3),
        ((5, EOS), "stop", None),
        ((5, EOS), "length", 2),
        ((5, 6, 9, 4), "length", None),
        ((5, 6, 9), "length", 3),
        ((5, 6, 9, 4, 4), "length", 4),
        ((), "stop", 0),
    ],
)
def test_an_answer_ends_where_its_parameters_say(
    output: tuple[int, ...], reason: str, wrong_at: int | None
) -> None:
    params = SamplingParams(max_new_tokens=4, stop=("</s>",))
    row = replace(long_row(), params=params, output=output, is_stopped=has_seven_then_eight)
    assert find_wrong_end(replace(row, finish_reason=reason)) == wrong_at  # type: ignore[arg-type]


def test_a_stop_string_ends_the_comparison_with_the_free_run() -> None:
    row = long_row()
    cut = replace(
        row,
        output=row.output[:5],
        params=replace(row.params, stop=("x",)),
        finish_reason="stop",
        is_stopped=lambda token_ids, stop, prompt: len(token_ids) >= 5,
    )
    audit = audit_row(MODEL, cut, EXACT, free_run=True)
    assert audit.exact and audit.free_run is not None
    assert audit.free_run.first_divergence is None
