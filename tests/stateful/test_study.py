"""The study: counts are those of the answers, and verdicts those of the counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ModelError
from pipeline.stateful.arms import Arm, all_arms
from pipeline.stateful.expected import expectations, headline, holds
from pipeline.stateful.found import Cell, Found, Share, age_class, difference, quarter_of
from pipeline.stateful.study import (
    StudySettings,
    load_study_model,
    read_measured,
    run_study,
)
from pipeline.stateful.study_page import render
from tests.engine import tiny
from tests.stateful.models import build_llama

CELLS = (
    Cell("gist", 0, 0, 10, 10, 0, 0, 1.0),
    Cell("gist", 512, 2, 20, 5, 4, 2, 30.0),
    Cell("recent", 0, 3, 30, 30, 0, 1, 3.0),
)
FOUND = Found("gist, gap, 64", "gist", "gap", 64, CELLS, 700, 0, 0, 2, 60.0, 1.0)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], list[str]]:
    """(page, content, what was said) of a study of two streams on a random model."""
    folder = tmp_path_factory.mktemp("study")
    build_llama().save_pretrained(folder / "model")
    said: list[str] = []
    settings = StudySettings(
        folder / "model", folder / "out", streams=2, windows=2, budgets=(64,),
        evictors=("window", "gist", "sink-recent", "h2o", "random"),
    )  # fmt: skip
    page = run_study(settings, said.append).read_text()
    return page, json.loads((folder / "out" / "study.json").read_text()), said


def test_every_arm_is_measured_and_shown(result: tuple[str, dict[str, Any], list[str]]) -> None:
    page, content, said = result
    arms = all_arms((64,), ("window", "gist", "sink-recent", "h2o", "random"))
    assert [one["arm"] for one in content["found"]] == [arm.name for arm in arms]
    assert len(said) == len(arms) and all(f"\n| {arm.name} |" in page for arm in arms)
    assert "**miss**" in page and "hit: " in page and "StreamingLLM" in page


def test_the_page_is_made_of_the_counts_alone(
    result: tuple[str, dict[str, Any], list[str]],
) -> None:
    page, content, _ = result
    assert render(content["settings"], read_measured(content), content) == page
    for one in content["found"]:
        cells = [Cell(*cell) for cell in one["cells"]]
        assert sum(cell.asked for cell in cells) == content["turns"] - 2 * 4  # of two streams
        assert all(cell.exact + cell.malformed <= cell.asked for cell in cells)


def test_skew_is_there_under_stale_alone(result: tuple[str, dict[str, Any], list[str]]) -> None:
    for one in result[1]["found"]:
        assert (one["skew"] > 0) == (one["positions"] == "stale" and one["evictor"] != "gist")


def test_the_same_seed_measures_the_same(
    result: tuple[str, dict[str, Any], list[str]], tmp_path: Path
) -> None:
    build_llama().save_pretrained(tmp_path / "model")
    settings = StudySettings(
        tmp_path / "model", tmp_path / "out", streams=2, windows=2, budgets=(64,),
        evictors=("window",),
    )  # fmt: skip
    measured = []
    for seed in (1, 1, 2):
        run_study(replace(settings, seed=seed), lambda _: None)
        content = json.loads((tmp_path / "out" / "study.json").read_text())
        measured.append([one["cells"] for one in content["found"]])
    assert measured[0] == measured[1] != measured[2]
    wanted = {one["arm"]: one["cells"] for one in result[1]["found"]}
    chosen = Arm("none", "gap"), Arm("gist", "stale", 192, 48), Arm("window", "gap", 64)
    for arm in chosen:
        assert wanted[arm.name] in measured[0]


def test_shares_are_of_the_turns_beyond_the_first_window() -> None:
    assert FOUND.share() == Share(35, 50)
    assert FOUND.share(kind="gist") == Share(5, 20)
    assert FOUND.share(kind="gist", quarters=(0, 2)) == Share(15, 30)
    assert FOUND.share("malformed") == Share(4, 50) and FOUND.share("repeated") == Share(3, 50)
    assert FOUND.share(age=512) == Share(5, 20) and FOUND.nll() == pytest.approx(33 / 50)
    assert Found.read(json.loads(json.dumps(FOUND.__dict__))) == FOUND
    assert [age_class(age) for age in (0, 63, 64, 255, 900)] == [0, 0, 64, 128, 512]
    assert [quarter_of(place) for place in (0, 255, 256, 1023, 1050)] == [0, 0, 1, 3, 3]


def test_intervals_are_those_of_the_binomial() -> None:
    assert str(Share(0, 0)) == "–" and str(Share(62, 64)) == "0.969 (0.905–0.994)"
    assert Share(0, 20).variance > 0
    assert difference(Share(60, 100), Share(50, 100))[1] == pytest.approx(0.14, abs=0.002)
    assert not holds(Share(60, 100), ">", Share(50, 100))
    assert holds(Share(600, 1000), ">", Share(500, 1000))
    assert holds(Share(500, 1000), "<", Share(600, 1000))
    assert holds(Share(990, 1000), "≈", Share(980, 1000))
    assert not holds(Share(600, 1000), "≈", Share(500, 1000))


def test_what_was_expected_is_said_beside_what_came(
    result: tuple[str, dict[str, Any], list[str]],
) -> None:
    measured = read_measured(result[1])
    verdicts = list(expectations(measured))
    assert len(list(headline(measured))) == 12 + 6
    assert [v.expected for v in verdicts if v.found.startswith("hit: 100.00%")] == [
        "window, 64: gap and rerotate answer alike"
    ]
    assert all(v.found.startswith(("hit: ", "**miss**: ")) for v in verdicts)
    assert {v.expected.split(",")[0] for v in verdicts} >= {"window", "gist", "sink-recent", "h2o"}


def test_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_study_model(tmp_path)
    tiny.build_model("llama").save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="is not the study's model"):
        load_study_model(tmp_path / "other")
