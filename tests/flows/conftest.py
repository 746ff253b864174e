"""One temporary Prefect server for all flow tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import flows  # noqa: F401  (sets Prefect's environment before prefect is imported)


@pytest.fixture(scope="session")
def prefect_harness() -> Iterator[None]:
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again in this process is tried at once."""
    monkeypatch.setattr("flows.tasks.RETRY_DELAYS_S", [0.0])
