"""A nightly job with a tiny model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.night.job import NightlyJob
from tests.storage.conftest import bucket, store, store_server  # noqa: F401


@pytest.fixture
def job(tmp_path: Path, model_folder: Path) -> NightlyJob:
    """With input for DAY."""
    job = NightlyJob(tmp_path, model_folder)
    job.give_input()
    return job


@pytest.fixture(scope="session")
def done_night(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """The folder of a job whose night of DAY is audited and not published. Do not change it."""
    job = NightlyJob(tmp_path_factory.mktemp("done"), model_folder, publish=None)
    job.give_input()
    (ending,) = job.sit()
    assert ending.state == "completed", ending.sentence()
    return job.folder


@pytest.fixture
def audited(tmp_path: Path, done_night: Path, model_folder: Path) -> NightlyJob:
    """A copy of `done_night`, to be published."""
    shutil.copytree(done_night, tmp_path, dirs_exist_ok=True)
    return NightlyJob(tmp_path, model_folder)
