"""The study: all arms run, cost what is said of them, and are judged by what was found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline.errors import ModelError
from pipeline.segments.arms import blend, encoding_cost, full, mode, untrained_arms
from pipeline.segments.assembled import Assembler
from pipeline.segments.orders import Bar, Order, Score, judge_bar, judge_order
from pipeline.segments.study import StudySettings, load_study_model, run_study
from pipeline.segments.study_page import render
from pipeline.segments.tasks import TASKS
from tests.engine import tiny
from tests.segments.rows import build_llama, difference, draw_segments, full_logits

ROWS = draw_segments()


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, object], list[str]]:
    """(page, content, what was said) of a study of almost nothing on a random model."""
    folder = tmp_path_factory.mktemp("study")
    build_llama().save_pretrained(folder / "model")
    said: list[str] = []
    settings = StudySettings(
        folder / "model", folder / "out", rows=3, seeds=1, training_rows=10, held_out=4,
        link_steps=1, packet_epochs=1,
    )  # fmt: skip
    page = run_study(settings, said.append).read_text()
    return page, json.loads((folder / "out" / "study.json").read_text()), said


def test_dependence_is_said_before_any_training(
    result: tuple[str, dict[str, object], list[str]],
) -> None:
    said = result[2]
    dependence = [i for i, line in enumerate(said) if line.startswith("dependence of")]
    training = [i for i, line in enumerate(said) if "packet" in line or "KVLink" in line]
    assert len(dependence) == len(TASKS) and max(dependence) < min(training)


def test_every_arm_is_on_every_table(result: tuple[str, dict[str, object], list[str]]) -> None:
    page, content, _ = result
    for arm in [*untrained_arms(1), *(f"packet {m}" for m in (1, 4, 8)), "packet 4 untrained",
                "packet 4 of local rows", "KVLink0", "KVLink1", "KVLink5", "5 links only",
                "same steps, full mask: full"]:  # fmt: skip
        assert page.count(f"\n| {arm} |") >= 3, arm
    assert "**miss**" in page and "hit" in page and "void" in page
    assert "NIAH" in page and "Block-Attention" in page
    assert render(content) == page


def test_full_attention_is_full_prefill_and_at_no_distance(
    result: tuple[str, dict[str, object], list[str]],
) -> None:
    model = build_llama()
    outcome = full(Assembler(model), ROWS)
    assert difference(outcome.logits, full_logits(model, ROWS)) < 1e-5
    measured = result[1]["measured"]
    assert isinstance(measured, list)
    whole = [one for one in measured if one["arm"] == "full"]
    assert all(
        one["kl"] < 1e-6 and one["top1"] == 1 and one["own"] == one["prompt"] for one in whole
    )


def test_costs_are_those_of_the_formulas() -> None:
    """With three layers CacheBlend computes 2/3 + r/3 of all but preamble and first document."""
    assembler = Assembler(build_llama())
    every = torch.tensor([float(sum(map(len, row))) for row in ROWS])
    question = torch.tensor([float(len(row[-1])) for row in ROWS])
    first = torch.tensor([float(len(row[0]) + len(row[1])) for row in ROWS])
    assert torch.equal(full(assembler, ROWS).own, every)
    assert torch.equal(mode("concat", True)(assembler, ROWS).own, question)
    for share in (0.0, 0.3, 1.0):
        own = blend(share)(assembler, ROWS).own - question
        rest = every - first - question
        torch.testing.assert_close(own, rest * (2 / 3 + share / 3), rtol=0, atol=0.2)
    tokens, seen = encoding_cost([[ROWS[0][0], ROWS[0][1][:3], ROWS[0][-1]]], soft_tokens=1)
    assert (float(tokens), float(seen)) == (5, 15)


def test_orders_are_hits_only_beyond_their_errors() -> None:
    scores = {(arm, "t"): Score(mean, 0.01) for arm, mean in (("a", 0.9), ("b", 0.89), ("c", 0.5))}

    def verdict(*arms: str) -> list[bool]:
        return [found.startswith("hit") for _, _, found in judge_order(Order("t", arms), scores)]

    assert verdict("a", "≈", "b", "≈", "c") == [True, False]
    assert verdict("a", ">", "b", ">", "c") == [False, True]
    assert verdict("b", "≥", "a", "≥", "c") == [True, True]
    assert verdict("c", "≥", "a") == [False]


def test_a_bar_asks_for_a_share_and_for_few_own_tokens() -> None:
    scores = {("full", "t"): Score(0.8, 0.0), ("x", "t"): Score(0.76, 0.0, 0.2)}
    assert judge_bar(Bar("x", "t", 0.95), scores)[1].startswith("hit: 95.0%")
    assert judge_bar(Bar("x", "t", 0.96), scores)[1].startswith("**miss**")
    assert judge_bar(Bar("x", "t", 0.9, 0.1), scores)[1].startswith("**miss**")


def test_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_study_model(tmp_path)
    tiny.build_model("llama").save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="is not the study's model"):
        load_study_model(tmp_path / "other")
