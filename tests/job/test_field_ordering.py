"""A template's fields in another order: fewer tokens, the same fields, and never without asking."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipeline.errors import RunDirectoryError, UsageError
from pipeline.job.advised_plan import plan_for_a_person
from pipeline.job.job import Job, open_job
from pipeline.job.planning import plan_rows
from pipeline.run import run_job
from tests.tiny_job import echo_settings, write_tokenizer

FIELDS = (
    "{% for name, value in fields('review', 'product', 'text') %}{{name}}: {{value}}\n{% endfor %}"
)
TEMPLATE = "classify\n" + FIELDS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """80 reviews of 8 products, whose long texts follow from their names."""
    products = [n % 8 for n in range(80)]
    pl.DataFrame(
        {
            "id": [f"r{n}" for n in range(80)],
            "review": [f"{n} of them" for n in range(80)],
            "product": [f"thing {p}" for p in products],
            "text": [f"{p} is a long text about a thing" for p in products],
        }
    ).write_parquet(tmp_path / "in.parquet")
    (tmp_path / "t.j2").write_text(TEMPLATE)
    write_tokenizer(tmp_path / "model")
    return tmp_path


def open_with(folder: Path, **settings: object) -> Job:
    flat = {"template": folder / "t.j2"} | settings
    return open_job(str(folder / "in.parquet"), echo_settings(folder / "model", **flat))


def prompts(job: Job) -> list[str]:
    return [str(content) for batch in job.source.iter_prompts() for content in batch.contents]


def test_the_same_fields_in_an_order_that_shares_more(folder: Path) -> None:
    given, ordered = open_with(folder), open_with(folder, reorder_fields=True)
    assert all(prompt.startswith("classify\nreview: ") for prompt in prompts(given))
    for before, after in zip(prompts(given), prompts(ordered), strict=True):
        assert before != after
        assert Counter(before.split("\n")) == Counter(after.split("\n"))
    first, second = (plan_rows(job).summary for job in (given, ordered))
    assert first.prompt_tokens == second.prompt_tokens
    assert second.saving > 3 * first.saving > 0


def test_a_plan_says_what_another_order_would_save(folder: Path) -> None:
    fields = plan_for_a_person(open_with(folder)).summary.fields
    assert fields is not None and not fields["is_applied"]
    assert fields["given"] == 0.0 and fields["fixed"] == fields["best"] == fields["bound"] > 0.5
    assert "review vary first" in fields["text"].replace("varies", "vary")
    assert fields["fixed_order"][-1] == "review"
    chosen = plan_for_a_person(open_with(folder, reorder_fields=True)).summary.fields
    assert chosen is not None and chosen["is_applied"] and chosen["best"] == fields["best"]


def test_rows_of_any_type_and_nulls_can_be_ordered(folder: Path) -> None:
    pl.DataFrame(
        {
            "id": range(6),
            "number": [0.5, None] * 3,
            "list": [["a"], []] * 3,
            "struct": [{"a": 1}, None] * 3,
            "flag": [True, None] * 3,
        }
    ).write_parquet(folder / "in.parquet")
    (folder / "t.j2").write_text(
        "{% for n, v in fields('number', 'list', 'struct', 'flag') %}{{ v or '' }} {% endfor %}"
    )
    job = open_with(folder, reorder_fields=True)
    assert job.fields is not None and job.fields.best == job.fields.bound


def test_a_limit_and_a_resumed_run_see_the_same_prompts(folder: Path) -> None:
    """And a run without the flag does not go on where one with it stopped."""
    settings = open_with(folder, reorder_fields=True, limit=33).settings
    source, out = str(folder / "in.parquet"), folder / "out"
    run_job(source, out, settings)
    assert len(pl.read_parquet(out / "data" / "*.parquet")) == 33
    assert run_job(source, out, settings).was_complete
    with pytest.raises(RunDirectoryError, match="reorder_fields"):
        run_job(source, out, open_with(folder, limit=33).settings)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ review }}", "needs a --template that lists fields"),
        ("{{ fields(review) }}", "line 1: fields(...) takes names of columns"),
        ("{{ fields() }}", "takes names of columns"),
        ("{{ fields('review', 'review') }}", "names a column twice"),
        ("{{ fields('review') }}\n{{ fields('text') }}", "may be called once"),
        ("\n {{ fields('review', 'absent') }}", "line 2, column 23, asks for 'absent'"),
    ],
)
def test_templates_that_cannot_be_ordered(folder: Path, template: str, said: str) -> None:
    (folder / "t.j2").write_text(template)
    with pytest.raises(UsageError) as caught:
        open_with(folder, reorder_fields=True)
    assert said in str(caught.value)


def test_memory_that_does_not_suffice_is_named(folder: Path) -> None:
    with pytest.raises(UsageError, match="--plan-memory 1GiB"):
        open_with(folder, reorder_fields=True, plan_memory=1000)
    assert plan_for_a_person(open_with(folder, plan_memory=1000)).summary.fields is None


def test_two_values_that_collide_change_no_prompt(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pl.Series, "hash", lambda self: pl.Series(np.zeros(len(self), np.uint64)))
    lines = [Counter(prompt.split("\n")) for prompt in prompts(open_with(folder))]
    ordered = open_with(folder, reorder_fields=True)
    assert [Counter(prompt.split("\n")) for prompt in prompts(ordered)] == lines


def test_more_fields_than_can_be_ordered_are_refused(folder: Path) -> None:
    names = [f"f{number}" for number in range(256)]
    row = {"id": ["a"], **{name: ["x"] for name in names}}
    pl.DataFrame(row).write_parquet(folder / "in.parquet")
    listed = ", ".join(map(repr, names))
    (folder / "t.j2").write_text(f"{{% for n, v in fields({listed}) %}}{{{{ v }}}}{{% endfor %}}")
    with pytest.raises(UsageError, match="lists 256 columns; at most 255 work"):
        plan_rows(open_with(folder, reorder_fields=True))
