"""The data set as the hub sees it: its card, that `datasets` reads it, and what would go there."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def publish() -> ModuleType:
    spec = importlib.util.spec_from_file_location("publish", ROOT / "data" / "publish.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ROWS = {
    "prompts": 2348, "messages": 360, "segments": 400, "conversations": 488,
}  # fmt: skip


@pytest.mark.parametrize("name", ["prompts", "messages", "segments", "conversations"])
def test_datasets_reads_every_configuration(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True, raising=False)
    found = datasets.load_dataset(str(ROOT / "data"), name, cache_dir=str(tmp_path))
    assert list(found) == ["train"]
    assert found["train"].num_rows == ROWS[name]


def test_the_card_names_files_that_are_there(publish: ModuleType, tmp_path: Path) -> None:
    assert set(publish.named_files()) == {
        "prompts.parquet", "prompts_messages.parquet", "segment_prompts.parquet",
        "conversation_prompts.parquet",
    }  # fmt: skip
    publish.check_card()
    (tmp_path / "README.md").write_bytes((ROOT / "data" / "README.md").read_bytes())
    with pytest.raises(SystemExit, match="names prompts.parquet, which is not there"):
        publish.check_card(tmp_path)


def test_a_dry_run_says_what_would_go_and_asks_nobody(
    publish: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(publish, "HfApi", lambda: pytest.fail("asks the hub"))
    publish.main(["owner/name", "--dry-run"])
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("  README.md") and "would go to datasets/owner/name" in said[-1]
    listed = {line.split()[-1] for line in said[:-1]}
    assert {"prompts.parquet", "demo_model/model.safetensors", "words.py"} <= listed
    assert not [name for name in listed if "__pycache__" in name or name.endswith(".pyc")]


def test_what_goes_is_what_the_dry_run_said(
    publish: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, Any]] = []

    class Hub:
        def create_repo(self, repo: str, **how: Any) -> None:
            asked.append(("create", (repo, how["repo_type"], how["exist_ok"])))

        def create_commit(self, repo: str, operations: Any, **how: Any) -> Any:
            asked.append(("commit", [operation.path_in_repo for operation in operations]))
            return type("Done", (), {"commit_url": "https://hub/commit/1"})

    publish.main(["owner/name", "--dry-run"])
    listed = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[:-1]]
    monkeypatch.setattr(publish, "HfApi", Hub)
    publish.main(["owner/name"])
    assert asked == [("create", ("owner/name", "dataset", True)), ("commit", listed)]
    assert capsys.readouterr().out == "https://hub/commit/1\n"


def test_a_name_that_is_none_is_refused(
    publish: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        publish.main(["name"])
    assert "name is no owner/name" in capsys.readouterr().err
