"""The browser, and the pages that it looks at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.report.page import render
from pipeline.storage.run_directory import RunDirectory
from tests.report.browser import launched
from tests.report.run_sample import AUDIT, make_nights, make_run, output_rows

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="module", autouse=True)
def whole_pages(pictures: None) -> None:
    """With their pictures."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One for all tests of a module, and gone with it: while it is there, Playwright keeps an event
    loop running in this thread, and what other tests do with asyncio would fail."""
    with launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def night_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the last of eight nights; its rows, ids and audit are those of `run_sample`."""
    root = make_nights(tmp_path_factory.mktemp("nights"))[-1]
    render(RunDirectory.open(root))
    return root / "report.html"


@pytest.fixture(scope="module")
def failed_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run whose audit failed."""
    root = tmp_path_factory.mktemp("failed") / "run"
    failed = AUDIT | {"verdict": "fail", "reasons": ["1 of 299 rows are <corrupt>"]}
    render(make_run(root, output_rows(), failed))
    return root / "report.html"
