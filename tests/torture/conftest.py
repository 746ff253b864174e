"""One fork server for all tortures."""

from __future__ import annotations

import pytest

from tests.torture.victim import Server


@pytest.fixture(scope="session")
def server() -> Server:
    return Server()
