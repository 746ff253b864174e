from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipeline.errors import RunDirectoryError
from pipeline.report.formats import cell, change, count, decimal, duration, percent, size
from pipeline.report.page import _flatten, _name_job, render
from pipeline.settings import JobSettings
from pipeline.storage.run_directory import RunDirectory
from tests.report.run_sample import AUDIT, EVIL_ID, make_nights, make_run, output_rows

_VOID = {"meta", "br", "hr", "img", "input", "link"}


class PageReader(HTMLParser):
    """Collects texts, ids and addresses, and insists that every tag is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.ids += [value for name, value in attrs if name == "id" and value]
        links = ("href", "src", "xlink:href", "action")
        self.addresses += [value or "" for name, value in attrs if name in links]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def read_page(html: str) -> PageReader:
    reader = PageReader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reports") / "run"
    render(make_run(root, output_rows()))
    return root


@pytest.mark.parametrize("name", ["report.html", "report.md"])
@pytest.mark.parametrize(
    "number",
    [
        "1,200", "412,345", "98,765", "76.0 %", "45,678", "494", "1 min 32 s", "97.0 %",
        "123 MiB", "512 MiB", "298", "1.6 %",
    ],
)  # fmt: skip
def test_the_numbers_of_run_json_are_shown(finished: Path, name: str, number: str) -> None:
    text = (finished / name).read_text(encoding="utf-8")
    shown = " ".join(read_page(text).texts) if name.endswith("html") else text
    assert re.search(rf"(?<![\d,.]){re.escape(number)}(?![\d,])", shown)


def test_the_page_shows_how_the_audit_was_checked(finished: Path) -> None:
    text = " ".join(read_page((finished / "report.html").read_text(encoding="utf-8")).texts)
    assert "8 faults planted" in text and "5 changed an answer" in " ".join(text.split())
    assert "2.5e-09" in text and EVIL_ID in text and "row-36" in text


def test_the_page_stands_on_its_own(finished: Path) -> None:
    html = (finished / "report.html").read_text(encoding="utf-8")
    reader = read_page(html)
    assert reader.tags["link"] == reader.tags["img"] == 0
    assert reader.tags["script"] == reader.tags["style"] == 1  # ours, named by the policy
    assert ' style="' not in html  # which lets no other style in either
    assert all(address.startswith("#") for address in reader.addresses)
    assert not re.search(r"url\((?!#)|@import|xmlns", html)
    assert re.findall(r"https?://[^\s<]*", html) == ["https://evil.example)"]  # as text, see below
    assert reader.tags["svg"] == 11  # mark, split, tree, sharing 3, audit 2, endings, tasks 2
    assert len(reader.ids) == len(set(reader.ids))


def test_text_of_rows_is_never_markup(finished: Path) -> None:
    html = (finished / "report.html").read_text(encoding="utf-8")
    assert html.count("<script") == html.count("</script") == 1 and "<b>1202" not in html
    assert "&lt;script&gt;" in html and "&lt;b&gt;1202&lt;/b&gt;" in html
    assert "secret" not in html  # of a system prompt the report tells the length
    assert "19 characters" in html
    markdown = (finished / "report.md").read_text(encoding="utf-8")
    assert "<script" not in markdown
    assert r"\| \[a\](https" in markdown


def test_the_same_run_gives_the_same_page(finished: Path) -> None:
    before = (finished / "report.html").read_bytes()
    render(RunDirectory.open(finished))
    assert (finished / "report.html").read_bytes() == before


def test_a_run_that_just_began_has_a_report(tmp_path: Path) -> None:
    render(make_run(tmp_path / "run", output_rows().clear(), audit=None))
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    shown = " ".join(read_page(html).texts)
    assert "not audited yet" in shown and "Nothing is measured yet" in shown
    assert 'data-key="rows_ok" data-value="">–<' in html
    assert "Not audited yet" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")


def test_a_failed_audit_says_so_and_why(tmp_path: Path) -> None:
    failed = AUDIT | {"verdict": "fail", "reasons": ["2 of 299 rows are <corrupt>"]}
    render(make_run(tmp_path / "run", output_rows(), failed))
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "FAILED" in html and "2 of 299 rows are &lt;corrupt&gt;" in html
    assert "Audit FAILED" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")


def test_a_damaged_summary_is_named(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "run", output_rows())
    (directory.root / "audit" / "summary.json").write_text("{", encoding="utf-8")
    with pytest.raises(RunDirectoryError, match="summary.json is damaged"):
        render(directory)


def test_a_damaged_table_is_named_and_a_missing_one_is_done_without(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "run", output_rows())
    tree = directory.root / "plan" / "tree.parquet"
    tree.write_bytes(b"PAR1 no more")
    with pytest.raises(RunDirectoryError, match="tree.parquet is damaged.*delete it"):
        render(directory)
    tree.unlink()
    render(directory)
    page = (directory.root / "report.html").read_text(encoding="utf-8")
    assert '<svg class="tree"' not in page and 'id="group-table"' in page


def test_settings_are_written_as_a_person_would(tmp_path: Path) -> None:
    """Seen red: `2147483648`, and `1800.0`."""
    flat = {"model": "m", "plan_memory": "2GiB", "kv_budget": "512MiB", "time_budget": "4h30m"}
    settings = JobSettings.from_flat(flat)
    shown = dict(_flatten(settings.model_dump(mode="json")))
    assert shown["plan-memory"] == "2 GiB" and shown["kv-budget"] == "512 MiB"
    assert shown["time-budget"] == "4 h 30 min" and shown["stall-timeout"] == "30 min 00 s"


def test_formats() -> None:
    assert [count(None), count(1234567), count(0)] == ["–", "1,234,567", "0"]
    assert [percent(0.7841), percent(0.99999), percent(1.0)] == ["78.4 %", "99.9 %", "100.0 %"]
    assert [percent(0.0), percent(0.0004)] == ["0.0 %", "0.04 %"]
    assert [size(512), size(1010 << 10), size(8 << 30)] == ["512 B", "1010 KiB", "8 GiB"]
    assert [duration(0.4213), duration(59.97), duration(242), duration(11230)] == [
        "0.421 s", "1 min 00 s", "4 min 02 s", "3 h 07 min"
    ]  # fmt: skip
    assert [decimal(494.35), decimal(12.345), decimal(0.5)] == ["494", "12.3", "0.5"]
    assert cell("a|b\n`c`") == r"a\|b \`c\`"


def test_both_files_compare_a_night_with_those_before(tmp_path: Path) -> None:
    """Seen red: with `trend[-1]` left in by `night_before`, nothing ever differs."""
    last = make_nights(tmp_path / "job")[-1]
    render(RunDirectory.open(last))
    page = read_page((last / "report.html").read_text(encoding="utf-8"))
    shown = " ".join(" ".join(page.texts).split())
    assert "The last 8 nights" in shown and "damaged" in shown and "interrupted" in shown
    links = [address for address in page.addresses if not address.startswith("#")]
    assert links == [f"../2026-11-{day}/report.html" for day in range(16, 9, -1)]
    markdown = (last / "report.md").read_text(encoding="utf-8")
    assert "since 2026-11-16" in markdown and "failed 3 (was 5)" in markdown
    assert "wall time −4.0 %" in markdown and "saved −0.6 points" in markdown


def test_a_run_alone_has_no_trend(tmp_path: Path) -> None:
    for place in (tmp_path / "2026-11-10", tmp_path / "other" / "run"):
        render(make_run(place, output_rows()))
        assert 'id="nights"' not in (place / "report.html").read_text(encoding="utf-8")
        assert "since" not in (place / "report.md").read_text(encoding="utf-8")


def test_changes_are_said_only_where_two_numbers_are() -> None:
    assert [change(112, 100), change(90.9, 96), change(5, 5)] == ["+12 %", "−5.3 %", "±0 %"]
    assert change(0.755, 0.76, points=True) == "−0.5 points"
    assert [change(None, 1), change(1, None), change(3, 0)] == ["", "", ""]


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("in/2026-11-22/*.parquet", "2026-11-22/*.parquet"),
        ("s3://b/day/*/part-?.parquet", "day/*/part-?.parquet"),
        ("*.parquet", "*.parquet"),
        ("/data/prompts.parquet", "prompts.parquet"),
        ("in/folder/", "folder"),
    ],
)
def test_an_input_is_called_by_its_name_and_a_pattern_by_its_folder(
    argument: str, named: str
) -> None:
    """Seen red: "*.parquet answered by demo_model" on the page of every night."""
    assert _name_job({"input": {"argument": argument}})[0] == named
