"""Templates over columns: what they make, what they are refused for, what they cannot reach."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from pipeline.errors import UsageError
from pipeline.settings import ReadSettings
from pipeline.storage.cells import BadCell
from pipeline.storage.prompt_template import PromptTemplate
from pipeline.storage.reader import open_source

TABLE = pl.DataFrame(
    {
        "id": ["a", "b", "c"],
        "product": ["lamp", "desk", None],
        "tags": [["x", "y"], [], ["z"]],
        "price": [1, 2, 3],
    }
)


def read(tmp_path: Path, template: str) -> tuple[list[object], dict[int, tuple[str, str]]]:
    """(contents, (error type, message) by row)."""
    (tmp_path / "t.j2").write_text(template)
    TABLE.write_parquet(tmp_path / "in.parquet")
    settings = ReadSettings(template=tmp_path / "t.j2")
    (batch,) = open_source(tmp_path / "in.parquet", settings).iter_prompts()
    faults = {bad.row_index: (bad.error_type, bad.message) for bad in batch.rejected}
    return list(batch.contents), faults


def test_columns_become_the_prompt(tmp_path: Path) -> None:
    template = "{{ product or 'nothing' }}{% for tag in tags %} #{{ tag }}{% endfor %}\n"
    contents, faults = read(tmp_path, template)
    assert contents == ["lamp #x #y\n", "desk\n", "nothing #z\n"] and not faults


def test_a_template_without_columns_is_the_same_prompt_for_all(tmp_path: Path) -> None:
    assert read(tmp_path, "Hello")[0] == ["Hello"] * 3


def test_a_null_is_an_error_of_its_row_and_never_the_word_none(tmp_path: Path) -> None:
    contents, faults = read(tmp_path, "A\n{{ product }}")
    assert contents == ["A\nlamp", "A\ndesk", None]
    assert faults[2][0] == "TemplateError" and "line 2" in faults[2][1] and "null" in faults[2][1]


def test_a_row_that_fails_is_told_by_line_and_not_quoted(tmp_path: Path) -> None:
    contents, faults = read(tmp_path, "{{ price }}\n{{ product + 1 }}")
    assert contents == [None] * 3
    assert faults[0][1] == "line 2 of the template fails on this row (TypeError)"
    assert read(tmp_path, "{{ '' }}")[1][0] == ("TemplateError", "the prompt is empty")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("one\n{{ product", "line 2, is not valid Jinja"),
        ("{% if product %}", "line 1, is not valid Jinja"),
        ("a\nb {{ colour }}", "line 2, column 6, asks for 'colour', which the input does not have"),
    ],
)
def test_a_wrong_template_is_a_usage_error_with_its_place(
    tmp_path: Path, template: str, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        read(tmp_path, template)


def test_files_and_columns_that_do_not_go_together(tmp_path: Path) -> None:
    TABLE.write_parquet(tmp_path / "in.parquet")
    with pytest.raises(UsageError, match="cannot read the template"):
        open_source(tmp_path / "in.parquet", ReadSettings(template=tmp_path / "absent.j2"))
    (tmp_path / "t.j2").write_text("x")
    settings = ReadSettings(template=tmp_path / "t.j2", prompt_column="product")
    with pytest.raises(UsageError, match="drop --prompt-column"):
        open_source(tmp_path / "in.parquet", settings)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ text.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__ }}",
        "{{ text.format.__globals__ }}",
        "{% for i in range(999999999) %}{% endfor %}",
        "{{ rows.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_reaches_nothing_but_its_row(attack: str) -> None:
    with pytest.raises(BadCell, match="fails on this row"):
        PromptTemplate(attack).render({"text": "secret", "rows": [1]})
