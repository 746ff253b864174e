"""A retry of a run below s3://: rows stay in one part each there too, whatever fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.location import Location
from pipeline.run import retry_job, run_job
from pipeline.settings import JobSettings
from pipeline.storage.remote_run import RemoteRun
from tests.job.test_retrying import Picky
from tests.storage.buckets import Store
from tests.storage.test_remote_run import (
    cache,
    manifest_in,
    names_in,
    out,
    prompts,
    rows_in,
    use_machine,
)
from tests.tiny_job import on

__all__ = ["cache", "out", "prompts"]  # fixtures


@pytest.fixture
def run(prompts: str, out: str, settings: JobSettings) -> Location:
    """Row 6 is refused, row 0 (as 2 and 4) and row 3 fail in the engine."""
    write = settings.write.model_copy(update={"fail_on_error": "100%"})
    allowing = settings.model_copy(update={"write": write})
    run_job(prompts, out, allowing, make_engine=on(Picky(0, 3)))
    return Location(out)


def test_a_retry_in_a_store_leaves_one_row_an_input_row(run: Location, store: Store) -> None:
    assert rows_in(store, str(run.path))["status"].to_list().count("error") == 5
    engine = Picky()
    outcome = retry_job(run, {}, make_engine=on(engine))
    assert sorted(engine.ran) == [0, 3]
    assert outcome.reasons == {"NullPrompt": 1}
    rows = rows_in(store, str(run.path))
    assert rows["row_index"].to_list() == list(range(7))
    assert rows["attempts"].to_list() == [2, 1, 2, 2, 2, 1, 0]
    named = manifest_in(store, str(run.path))["parts"]
    assert {f"data/{name}" for name in named} == {
        name for name in names_in(store, str(run.path)) if name.startswith("data/")
    }
    assert "_SUCCESS" in names_in(store, str(run.path))


def test_a_retry_that_dies_before_the_store_knows_goes_on_elsewhere(
    run: Location, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:

        def fail(*_: object) -> None:
            raise StorageError("the network is gone")

        patch.setattr(RemoteRun, "_put", fail)
        with pytest.raises(StorageError, match="network"):
            retry_job(run, {}, make_engine=on(Picky()))
    assert len(rows_in(store, str(run.path))) == 7
    use_machine(monkeypatch, tmp_path / "elsewhere")
    retry_job(run, {}, make_engine=on(Picky()))
    assert rows_in(store, str(run.path))["row_index"].to_list() == list(range(7))
    assert rows_in(store, str(run.path))["status"].to_list().count("error") == 1


def test_a_retry_that_dies_after_parts_are_swapped_goes_on_elsewhere(
    run: Location, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stop() -> None:
        raise StorageError("stop")

    with pytest.raises(StorageError):
        retry_job(run, {}, make_engine=on(Picky(after=0, act=stop)))
    assert rows_in(store, str(run.path))["row_index"].to_list() == [1, 5, 6]
    use_machine(monkeypatch, tmp_path / "elsewhere")
    retry_job(run, {}, make_engine=on(Picky()))
    assert rows_in(store, str(run.path))["attempts"].to_list() == [2, 1, 2, 2, 2, 1, 0]
