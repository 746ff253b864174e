"""The page as a browser shows it: light and dark, wide and narrow, on paper, by mouse and keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pipeline.plan_files import write_plan_page
from pipeline.run import plan_job
from pipeline.settings import JobSettings
from tests.report.browser import opened
from tests.report.run_sample import EVIL_ID
from tests.tiny_job import write_prompts

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

PHONE = {"width": 390, "height": 844}
# Every text against what is painted behind it: [text, ratio] of those below WCAG AA, 4.5 or 3.
FAINT_TEXTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const parse = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return parse("white");
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const faint = [];
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    const text = texts.currentNode.data.trim();
    if (!text || ["SCRIPT", "STYLE", "title"].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const ink = parse(element instanceof SVGElement ? style.fill : style.color);
    const [a, b] = [light(ink), light(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const isLarge = parseFloat(style.fontSize) >= 24;
    if (ratio < (isLarge ? 3 : 4.5)) faint.push([text, ratio]);
  }
  return faint;
}"""
PAINT = "e => getComputedStyle(e).%s"


def column(table: Locator, number: int) -> list[str]:
    cells = table.locator(f"tbody tr > :nth-child({number})")
    values: list[str] = cells.evaluate_all("cells => cells.map(c => c.dataset.value ?? '')")
    return values


def key_number(page: Page, name: str) -> float:
    value = page.locator(f"[data-key={name}]").get_attribute("data-value")
    assert value is not None
    return float(value)


CUT = """() => [...document.querySelectorAll(".scroll")]
  .filter((e) => e.scrollWidth > e.clientWidth + 1).map((e) => e.getAttribute("aria-label"))"""


def test_the_key_numbers_are_those_of_run_json(browser: Browser, night_page: Path) -> None:
    """Seen red: with the tile of computed tokens taken from the plan."""
    root = night_page.parent
    run = json.loads((root / "run.json").read_text())["counters"]
    plan = json.loads((root / "plan" / "summary.json").read_text())
    with opened(browser, night_page) as seen:
        names = (
            "rows_ok", "rows_error", "prompt_tokens", "prefilled_tokens", "generated_tokens",
            "wall_s",
        )  # fmt: skip
        assert {name: key_number(seen.page, name) for name in names} == {n: run[n] for n in names}
        asked = run["cached_tokens"] + run["prefilled_tokens"]
        assert key_number(seen.page, "saved_share") == run["cached_tokens"] / asked
        shown = seen.page.locator("#plan-table tbody tr").all_inner_texts()
        assert (
            f"{plan['unique_tokens']:,}" in shown[0] and f"{run['prefilled_tokens']:,}" in shown[0]
        )
        rows = seen.page.locator("#group-table tr > :nth-child(2)").all_inner_texts()[1:]
        assert sum(int(cell.replace(",", "")) for cell in rows) == 1203


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_is_readable_in_both_schemes(
    browser: Browser, night_page: Path, failed_page: Path, scheme: str
) -> None:
    """Seen red: with the soft ink of the light scheme left as it is in the dark one."""
    for path in (night_page, failed_page):
        with opened(browser, path, color_scheme=scheme) as seen:
            assert seen.page.evaluate(FAINT_TEXTS) == []


def test_pictures_follow_the_scheme(browser: Browser, night_page: Path) -> None:
    """Seen red: with the colours of matplotlib left in."""
    painted: list[list[Any]] = []
    for scheme in ("light", "dark"):
        with opened(browser, night_page, color_scheme=scheme) as seen:
            bar = seen.page.locator("svg[aria-label^='Prompt tokens'] path[fill='var(--leaf)']")
            text = seen.page.locator("svg[aria-label^='Prompt tokens'] text")
            box = seen.page.locator("svg.tree .shared0")
            painted.append([e.first.evaluate(PAINT % "fill") for e in (bar, text, box)])
            painted[-1].append(seen.page.locator("body").evaluate(PAINT % "backgroundColor"))
    assert all(light != dark for light, dark in zip(*painted, strict=True)), painted


def test_a_phone_shows_whole_tables(browser: Browser, night_page: Path, failed_page: Path) -> None:
    """Seen red: six tables were cut at the edge of the screen."""
    for path in (night_page, failed_page):
        with opened(browser, path, viewport=PHONE, is_mobile=True, has_touch=True) as seen:
            assert seen.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
            assert seen.page.evaluate(CUT) == []
            smallest = seen.page.evaluate(
                "Math.min(...[...document.querySelectorAll('svg text')]"
                ".map((e) => e.getBoundingClientRect().height))"
            )
            assert smallest >= 7


def test_a_table_is_sorted_by_click(browser: Browser, night_page: Path) -> None:
    """Seen red: with numbers compared as text, 9 before 80."""
    with opened(browser, night_page) as seen:
        table = seen.page.locator("#group-table")
        before = column(table, 1)
        header = table.get_by_role("columnheader", name="tokens saved")
        assert header.get_attribute("aria-sort") == "none"
        header.get_by_role("button").click()
        saved = [int(value) for value in column(table, 4)]
        assert header.get_attribute("aria-sort") == "descending"
        assert saved == sorted(saved, reverse=True) and saved != sorted(saved)
        header.get_by_role("button").click()
        assert [int(value) for value in column(table, 4)] == sorted(saved)
        sorts = table.locator("th[scope=col]").evaluate_all("t => t.map(e => e.ariaSort)")
        assert sorts == ["none"] * 3 + ["ascending"] + ["none"] * 3
        assert sorted(column(table, 1)) == sorted(before) and column(table, 1) != before
        # Equal numbers stay in the order that they had: nobody failed, so nothing moves.
        order = column(table, 1)
        table.get_by_role("columnheader", name="failed").get_by_role("button").click()
        assert column(table, 1) == order


def test_a_table_is_sorted_by_keys_and_unknown_numbers_stay_last(
    browser: Browser, night_page: Path
) -> None:
    """Seen red: with unknown numbers taken for nothing; with words taken for numbers."""
    with opened(browser, night_page) as seen:
        table = seen.page.locator("#night-table")
        header = table.get_by_role("columnheader", name="wall time")
        header.get_by_role("button").focus()
        for key, order in (("Enter", "descending"), ("Space", "ascending")):
            seen.page.keyboard.press(key)
            assert header.get_attribute("aria-sort") == order
            times = column(table, 6)
            assert times[-2:] == ["", ""]
            known = [float(value) for value in times[:-2]]
            assert known == sorted(known, reverse=order == "descending")
        state = table.get_by_role("columnheader", name="state")
        state.get_by_role("button").press("Enter")
        texts = table.locator("tbody td:nth-child(2)").all_inner_texts()
        assert texts == sorted(texts) and len(set(texts)) == 3
        outline = state.get_by_role("button").evaluate(PAINT % "outlineStyle")
        assert outline == "solid"  # where the keys are is seen


def test_ids_are_inert(browser: Browser, failed_page: Path) -> None:
    """Seen red: with `| safe` behind the id of a failed row."""
    with opened(browser, failed_page) as seen:
        page = seen.page
        assert page.get_by_text(EVIL_ID, exact=True).count() == 2  # a failed row, a differing one
        assert page.locator("img, iframe, object").count() == 0
        assert page.locator("script").count() == 1 and "owned" not in page.title()


def test_the_policy_refuses_what_is_not_ours(browser: Browser, failed_page: Path) -> None:
    """Were an id markup after all, the browser would neither run nor fetch anything for it."""
    with opened(browser, failed_page) as seen:
        page = seen.page
        page.evaluate(
            "document.body.insertAdjacentHTML('beforeend',"
            " '<img src=https://evil.example/x.png onerror=document.title=1><p style=color:red>')"
        )
        page.wait_for_function("window.violations.length >= 2")
        refused = page.evaluate("window.violations")
        assert any(line.startswith("img-src https://evil.example") for line in refused)
        assert any(line.startswith("style-src-attr") for line in refused)
        assert page.title().endswith("coppice") and len(seen.requests) <= 2
        seen.messages.clear()
        seen.requests[1:] = []
        page.evaluate("window.violations = []")


def test_without_scripts_all_is_there(browser: Browser, night_page: Path) -> None:
    with opened(browser, night_page, java_script_enabled=False) as seen:
        assert seen.page.locator("#group-table tbody tr").count() == 17
        assert seen.page.get_by_role("columnheader", name="tokens saved").is_visible()
        assert seen.page.locator("th button").count() == 0  # nothing that would do nothing


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_paper_is_white_and_shows_whole_tables(
    browser: Browser, night_page: Path, scheme: str
) -> None:
    """As wide as A4. Seen red: with the dark scheme not bound to screens."""
    paper = {"width": 720, "height": 1000}
    with opened(browser, night_page, color_scheme=scheme, viewport=paper) as seen:
        seen.page.emulate_media(media="print")
        body = seen.page.locator("body")
        assert body.evaluate(PAINT % "backgroundColor") == "rgb(255, 255, 255)"
        assert (
            body.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light only"
        )
        assert seen.page.evaluate("document.documentElement.scrollWidth") == paper["width"]
        assert seen.page.evaluate(FAINT_TEXTS) == []
        table = seen.page.get_by_role("region", name="Prefix groups")
        assert table.evaluate("e => e.scrollHeight <= e.clientHeight + 1")
        assert len(seen.page.pdf(format="A4")) > 20_000


def test_headings_tables_and_figures_are_named(browser: Browser, night_page: Path) -> None:
    """What a screen reader stands on. Seen red: with an h3 in the trend before its h2."""
    with opened(browser, night_page) as seen:
        levels = seen.page.locator("h1, h2, h3, h4").evaluate_all("h => h.map(e => +e.tagName[1])")
        assert levels[0] == levels.count(1) == 1
        assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
        assert seen.page.locator("th:not([scope])").count() == 0
        assert seen.page.locator("svg:not([role=img][aria-label]):not([aria-hidden])").count() == 0
        boxes = seen.page.locator(".scroll")
        assert boxes.count() == seen.page.locator(".scroll[tabindex='0'][role=region]").count()
        for link in seen.page.locator("nav a").all():
            target = link.get_attribute("href")
            assert target is not None and seen.page.locator(target).count() == 1


def test_a_link_leads_to_the_page_of_a_night(browser: Browser, night_page: Path) -> None:
    with opened(browser, night_page) as seen:
        link = seen.page.locator("#night-table a").first
        assert link.get_attribute("href") == "../2026-11-16/report.html"
        address = link.evaluate("e => e.href")
        assert address == (night_page.parents[1] / "2026-11-16" / "report.html").as_uri()


def test_the_page_of_a_plan_is_as_good(
    browser: Browser, tmp_path: Path, settings: JobSettings
) -> None:
    prompts = [f"at {i} o clock\nsay what this long instruction asks for\nq {i}" for i in range(30)]
    source = write_prompts(tmp_path / "p.parquet", prompts)
    write_plan_page(plan_job(str(source), settings), EVIL_ID, tmp_path / "plan.html")
    for scheme in ("light", "dark"):
        with opened(browser, tmp_path / "plan.html", viewport=PHONE, color_scheme=scheme) as seen:
            assert seen.page.evaluate(FAINT_TEXTS) == []
            assert seen.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
            assert seen.page.locator("svg.tree rect").count() > 30


@pytest.mark.parametrize("width", [390, 1280])
def test_tiles_that_do_not_fill_their_rows_leave_no_dark_block(
    browser: Browser, night_page: Path, width: int
) -> None:
    """Seen red: with a price there are ten tiles in rows of four, and the rest was as dark as the
    lines between them."""
    with opened(browser, night_page) as seen:
        seen.page.set_viewport_size({"width": width, "height": 900})
        for rest, tile in ((".tiles", ".tile"), (".sparks", ".sparks > div")):
            paints = [
                seen.page.locator(found).first.evaluate(PAINT % "backgroundColor")
                for found in (rest, tile)
            ]
            assert paints[0] == paints[1]
