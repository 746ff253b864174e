"""Templates over columns: what they make, what they are refused for, what they cannot reach."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from pipeline.errors import UsageError
from pipeline.inputs.bad_cell import BadCell
from pipeline.inputs.prompt_source import open_source
from pipeline.inputs.prompt_template import PromptTemplate
from pipeline.location import Location
from pipeline.prompt_settings import ReadSettings

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
    (batch,) = open_source(Location(tmp_path / "in.parquet"), settings).iter_prompts()
    faults = {bad.row_index: (bad.error_type, bad.message) for bad in batch.rejected}
    return list(batch.contents), faults


def test_columns_become_the_prompt(tmp_path: Path) -> None:
    template = "{{ product or 'nothing' }}{% for tag in tags %} #{{ tag }}{% endfor %}\n"
    contents, faults = read(tmp_path, template)
    assert contents == ["lamp #x #y\n", "desk\n", "nothing #z\n"] and not faults


def test_what_shares_its_name_with_something_of_jinja_or_a_dict_is_the_column() -> None:
    """Seen red: a function's address as the prompt, another one at each start."""
    row = {"range": "5-10", "order": {"items": "3 pens", "n": 2}}
    template = PromptTemplate("{{ range }} {{ order.items }} {{ order.n }}", list(row))
    assert template.columns == ("order", "range") and template.render(row) == "5-10 3 pens 2"


@pytest.mark.parametrize("printed", ["text.upper", "range", "self", "row.keys"])
def test_a_function_is_not_printed(printed: str) -> None:
    template = PromptTemplate(f"{{{{ {printed} }}}}{{{{ text }}}}", ["text", "row"])
    with pytest.raises(BadCell, match="prints a function"):
        template.render({"text": "x", "row": {"a": 1}})


def test_a_null_is_an_error_of_its_row_and_never_the_word_none(tmp_path: Path) -> None:
    contents, faults = read(tmp_path, "A\n{{ product }}")
    assert contents == ["A\nlamp", "A\ndesk", None]
    assert faults[2][0] == "TemplateError" and "line 2" in faults[2][1] and "null" in faults[2][1]


def test_a_row_that_fails_is_told_by_line_and_not_quoted(tmp_path: Path) -> None:
    contents, faults = read(tmp_path, "{{ price }}\n{{ product + 1 }}")
    assert contents == [None] * 3
    assert faults[0][1] == "line 2 of the template fails on this row (TypeError)"
    empty = read(tmp_path, "{{ product and '' or '' }}")[1][0]
    assert empty == ("TemplateError", "the prompt is empty")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("one\n{{ product", "line 2, is not valid Jinja"),
        ("{% if product %}", "line 1, is not valid Jinja"),
        ("Hello", "names no column"),
        ("{{ [1, 2] | random }}{{ price }}", "line 1, is not valid Jinja: No filter named"),
        ("\n{% include 'other' %}{{ price }}", "line 2: other files cannot be read"),
        ("{{ lipsum() }}{{ price }}", "asks for 'lipsum'"),
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
        open_source(
            Location(tmp_path / "in.parquet"), ReadSettings(template=tmp_path / "absent.j2")
        )
    (tmp_path / "t.j2").write_bytes(b"\xff{{ price }}")
    settings = ReadSettings(template=tmp_path / "t.j2")
    with pytest.raises(UsageError, match="not UTF-8"):
        open_source(Location(tmp_path / "in.parquet"), settings)
    (tmp_path / "t.j2").write_bytes(b"\xef\xbb\xbf{{ price }}")
    (batch,) = open_source(Location(tmp_path / "in.parquet"), settings).iter_prompts()
    assert batch.contents == ["1", "2", "3"]
    settings = ReadSettings(template=tmp_path / "t.j2", prompt_column="product")
    with pytest.raises(UsageError, match="drop --prompt-column"):
        open_source(Location(tmp_path / "in.parquet"), settings)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ text.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__ }}",
        "{{ text.format.__globals__ }}",
        "{% for i in range(999999999) %}{% endfor %}",
        "{{ rows.append(1) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_reaches_nothing_but_its_row(attack: str) -> None:
    with pytest.raises(BadCell, match="fails on this row"):
        template = PromptTemplate(attack + "{{ text }}{{ rows }}", ["text", "rows"])
        template.render({"text": "secret", "rows": [1]})


def test_what_is_constant_fails_on_a_row_and_not_before() -> None:
    """Seen red: UndefinedError, out of the search for names of columns."""
    template = PromptTemplate("{{ x if 1[1] else x }}", ["x"])
    assert template.columns == ("x",)
    with pytest.raises(BadCell, match="line 1 .*UndefinedError"):
        template.render({"x": "a"})
