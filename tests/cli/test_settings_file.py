"""`coppice init`: a file that names every setting, and says nothing when it is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.cli.layers import merge, merge_scores
from pipeline.cli.options import HELP, _plain, _words
from pipeline.cli.settings_file import commented_settings
from pipeline.errors import UsageError
from pipeline.settings import SECTIONS, JobSettings


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "coppice.yaml"
    path.write_text(commented_settings())
    return path


def test_the_file_that_init_writes_means_the_defaults(file: Path) -> None:
    assert merge({"model": "org/name"}, file) == JobSettings.from_flat({"model": "org/name"})


def test_the_file_has_every_setting_with_its_meaning_and_choices(file: Path) -> None:
    text = file.read_text()
    flat, one_line = yaml.safe_load(text), " ".join(text.replace("\n# ", " ").split())
    for section in SECTIONS.values():
        for name, field in section.model_fields.items():
            assert name.replace("_", "-") in flat
            assert HELP[name] in one_line
            assert all(str(word) in one_line for word in _words(_plain(field.annotation)))


def test_sizes_and_durations_are_written_as_people_write_them(file: Path) -> None:
    flat = yaml.safe_load(file.read_text())
    assert (flat["plan-memory"], flat["stall-timeout"]) == ("2GiB", "30m")


def test_the_file_can_name_a_model_and_then_says_all_that_a_run_needs(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(commented_settings("org/name"))
    assert merge({}, path).model.model == "org/name"


def test_a_flag_wins_over_the_file_that_init_writes(file: Path) -> None:
    assert merge({"model": "m", "max_rows": "7"}, file).engine.max_rows == 7


def test_with_the_file_that_init_writes_scores_are_still_of_the_column_choices(file: Path) -> None:
    assert merge_scores({"model": "m"}, file).scoring.choices_column == "choices"


def test_choices_of_a_file_are_scored_and_no_column(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: m\nchoices: [a, b]\n")
    flags = dict.fromkeys(SECTIONS["scoring"].model_fields)
    assert merge_scores(flags, path).scoring.choices == ("a", "b")


def test_init_writes_a_file_and_replaces_none_unless_it_is_told_to(tmp_path: Path) -> None:
    path = tmp_path / "coppice.yaml"
    written = CliRunner().invoke(app, ["init", str(path), "--model", "org/name"])
    assert (written.exit_code, written.stdout) == (0, f"{path}\n")
    assert path.read_text() == commented_settings("org/name")
    path.write_text("mine")
    refused = CliRunner().invoke(app, ["init", str(path)])
    assert isinstance(refused.exception, UsageError)
    assert "--overwrite" in str(refused.exception) and path.read_text() == "mine"
    CliRunner().invoke(app, ["init", str(path), "--overwrite"])
    assert path.read_text() == commented_settings()


def test_init_without_a_file_shows_it_on_stdout() -> None:
    assert CliRunner().invoke(app, ["init"]).stdout == commented_settings()
