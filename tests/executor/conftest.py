"""A real Ray cluster of two CPUs on this machine, for all tests that ask for it."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import install_extra
from tests.executor import ray_engines

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def ray_environment() -> Iterator[dict[str, str]]:
    """What a cluster of the tests needs: a folder so short that its sockets fit, and a token of its
    own, without which Ray would leave one in the user's home."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip(f"ray is not installed; {install_extra('ray')}")
    short = tempfile.mkdtemp(prefix="cr", dir="/tmp")
    token = secrets.token_hex(32)
    yield {
        "RAY_TMPDIR": short,
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    shutil.rmtree(short, ignore_errors=True)


@pytest.fixture(scope="session")
def cluster(
    ray_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A cluster in this process's name; yields the folder by which its workers are told things."""
    import ray

    workers = tmp_path_factory.mktemp("workers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "")  # Ray sets it; so it is put back afterwards
        patch.delenv("RAY_AUTH_MODE")
        for name, value in {**ray_environment, ray_engines.FOLDER: str(workers)}.items():
            patch.setenv(name, value)
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=100 << 20,
        )
        yield workers
        ray.shutdown(wait_for_processes=True)


@pytest.fixture
def workers(cluster: Path) -> Iterator[Path]:
    """The folder, empty, for jobs with watched workers (`make_engine=make_watched`)."""
    yield cluster
    for path in cluster.iterdir():
        path.unlink()
