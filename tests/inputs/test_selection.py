"""Which files of a folder are rows: no temporary ones, nothing of ours, linked folders once."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.inputs.input_files import find_input_files
from pipeline.inputs.prompt_source import open_source
from pipeline.inputs.selection import HIDDEN, OTHER_JSON, OUTPUTS, search, select
from pipeline.location import Location
from pipeline.prompt_settings import ReadSettings
from pipeline.run import run_job
from pipeline.settings import JobSettings
from tests.tiny_job import answers, write_prompts


def prompts(folder: Path, name: str, *texts: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = [f"{name}{number}" for number in range(len(texts))]
    return write_prompts(path, [*texts], id=ids)


@pytest.mark.parametrize(
    "name",
    [
        "_temporary/0/part.parquet",
        ".ipynb_checkpoints/a-checkpoint.jsonl",
        "x/_delta_log/1.parquet",
        "x/.hidden/y/b.parquet",
        "_SUCCESS.parquet",
        ".b.jsonl.gz",
    ],
)
def test_any_hidden_part_of_a_path_leaves_a_file_out(name: str) -> None:
    """Seen red: only the file's own name counted (18 rows for 10)."""
    found = select(["a.parquet", name, "x/c.jsonl"])
    assert found.names == ("a.parquet", "x/c.jsonl") and found.left_out == {HIDDEN: 1}


def test_the_folder_itself_may_have_any_name(tmp_path: Path) -> None:
    prompts(tmp_path / "_mine" / ".deep", "a.parquet", "x")
    assert search(tmp_path / "_mine" / ".deep").names == ("a.parquet",)


def test_runs_and_plans_are_no_input() -> None:
    run = ["out/run.json", "out/data/part-00000-0.parquet", "out/plan/plan.parquet"]
    plan = ["p/plan.parquet", "p/tree.parquet", "p/summary.json"]
    others = ["logs/run.json", "logs/a.parquet", "q/plan.parquet"]
    found = select([*run, *plan, *others])
    assert found.names == ("logs/a.parquet", "q/plan.parquet")
    assert found.left_out == {OUTPUTS: 4, OTHER_JSON: 1}


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    """Seen red: not at all, and nothing said so. A link to a folder above ends nothing."""
    folder = tmp_path / "in"
    prompts(folder, "a.parquet", "one")
    prompts(tmp_path / "elsewhere", "b.parquet", "two")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "link2").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    found = search(folder)
    assert found.names == ("a.parquet", "link/b.parquet")
    assert found.describe() == "2 files are read; left out: 2 linked folders that are read already"


def test_a_pattern_reads_a_file_once_though_links_go_in_circles(tmp_path: Path) -> None:
    """Seen red: a folder that links to itself gave each row forty times."""
    write_prompts(tmp_path / "a.parquet", ["a"])
    (tmp_path / "loop").symlink_to(tmp_path)
    found = find_input_files(Location(f"{tmp_path}/**/*.parquet"))
    assert [file.name for file in found.files] == [f"{tmp_path}/a.parquet"]
    assert "matched again by way of a linked folder" in found.summary


def test_files_that_are_nearly_rows_are_counted(tmp_path: Path) -> None:
    """Seen red: left out in silence."""
    write_prompts(tmp_path / "a.parquet", ["a"])
    write_prompts(tmp_path / "B.PARQUET", ["b"])
    (tmp_path / "c.parquet").symlink_to(tmp_path / "gone")
    said = search(tmp_path).describe()
    assert said == (
        "1 file is read; left out: 1 that link to nothing, 1 whose ending is not in small letters"
    )


def test_what_is_read_is_said_with_counts(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.parquet", "_x/c.parquet"):
        prompts(tmp_path, name, "hello")
    said = open_source(Location(tmp_path), ReadSettings()).summary
    assert said.endswith(
        "2 files are read; left out: 1 with a name or a folder that begins with _ or ."
    )
    assert open_source(Location(tmp_path / "a.parquet"), ReadSettings()).summary == ""
    assert open_source(Location(f"{tmp_path}/**/*.parquet"), ReadSettings()).num_rows == 2
    assert open_source(Location(f"{tmp_path}/_x/*.parquet"), ReadSettings()).num_rows == 1


def test_a_renamed_file_of_a_folder_is_another_input(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.parquet"):
        prompts(tmp_path, name, "hello")
    before = open_source(Location(tmp_path), ReadSettings()).fingerprint()
    (tmp_path / "b.parquet").rename(tmp_path / "c.parquet")
    assert open_source(Location(tmp_path), ReadSettings()).fingerprint() != before


@pytest.mark.fault(
    "output inside the input folder",
    injected="run -o in/out, and the same command again",
    outcome="resumed; its parts are no rows",
)
def test_an_output_within_the_input_is_resumed(tmp_path: Path, settings: JobSettings) -> None:
    """Seen red: "another input", and the parts read as rows."""
    folder = tmp_path / "in"
    prompts(folder, "a.parquet", "one", "two")
    for was_complete in (False, True):
        outcome = run_job(str(folder), folder / "out", settings)
        assert outcome.was_complete is was_complete
    assert answers(folder / "out")["prompt"].to_list() == ["one", "two"]
    assert run_job(f"{folder}/**/*.parquet", tmp_path / "other", settings).was_complete is False
    assert answers(tmp_path / "other")["prompt"].to_list() == ["one", "two"]
