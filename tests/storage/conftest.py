"""One object store for all tests of a session; each test has a bucket of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.storage.buckets import Store, use_store


@pytest.fixture(scope="session")
def store_server() -> Iterator[Store]:
    store = Store()
    yield store
    store.stop()


@pytest.fixture
def store(store_server: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    use_store(monkeypatch, store_server.url)
    return store_server


@pytest.fixture
def bucket(store: Store) -> str:
    return store.new_bucket()
