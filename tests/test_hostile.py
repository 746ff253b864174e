"""Templates as attackers and as chance would write them: a named error or a text, and soon."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.inputs import prompt_template
from pipeline.inputs.bad_cell import BadCell
from pipeline.inputs.prompt_template import PromptTemplate
from pipeline.tokens import chat_template
from tests import hostile
from tests.tiny_job import write_tokenizer

pytestmark = pytest.mark.timeout(600)  # a process for each attack: some 40 s, minutes when busy
Outcomes = dict[tuple[str, str], tuple[str, float]]


def cases(slow: bool) -> list[tuple[str, str]]:
    """Attacks on time and memory, and kinds of templates."""
    pairs = itertools.product(hostile.EXHAUSTION, hostile.KINDS)
    return [(attack, kind) for attack, kind in pairs if hostile.is_slow(attack, kind) == slow]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """(attack, kind of template) -> (what a person is told, seconds), all in one child."""
    return run_child(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def slow_outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Those of the attacks that the fast suite leaves out."""
    return run_child(tmp_path_factory.mktemp("hostile"), "slow")


def run_child(folder: Path, *words: str) -> Outcomes:
    write_tokenizer(folder)
    command = [sys.executable, "-m", "tests.hostile", str(folder), *words]
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=550, cwd=folder,
        env=os.environ | {"PYTHONPATH": root},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not list(folder.rglob("ran"))
    lines = map(json.loads, done.stdout.splitlines())
    return {(name, kind): (said, seconds) for name, kind, said, seconds in lines}


@pytest.mark.fault(
    "templates that reach outside",
    injected="19 escapes from the sandbox, as --template and as chat template",
    outcome="the row is an error or the call refused; nothing is run or quoted",
)
@pytest.mark.parametrize("kind", hostile.KINDS)
@pytest.mark.parametrize("attack", hostile.ESCAPES)
def test_a_template_reaches_nothing_outside(outcomes: Outcomes, attack: str, kind: str) -> None:
    """Seen red: with a sandbox to which every attribute is safe (a command was run)."""
    said, _ = outcomes[attack, kind]
    assert said.startswith(("row: ", "job: ")) and "secret" not in said


@pytest.mark.fault(
    "templates without end",
    injected="endless loops, huge texts and numbers, deep nesting",
    outcome="an error of the row within its time limit, or a refusal; never a hang",
)
@pytest.mark.parametrize(("attack", "kind"), cases(slow=False))
def test_a_template_takes_neither_all_time_nor_all_memory(
    outcomes: Outcomes, attack: str, kind: str
) -> None:
    """Seen red: "nested loops" without a limit (hung), "string in steps" in chats and "deep loops"
    in both (an unexpected MemoryError, SyntaxError ended the job)."""
    said, seconds = outcomes[attack, kind]
    assert said.startswith(("row: ", "job: ")) and seconds < 30


@pytest.mark.slow
@pytest.mark.parametrize(("attack", "kind"), cases(slow=True))
def test_no_other_chat_template_does(slow_outcomes: Outcomes, attack: str, kind: str) -> None:
    said, seconds = slow_outcomes[attack, kind]
    assert said.startswith(("row: ", "job: ")) and seconds < 30


@pytest.mark.parametrize("attack", ["string in steps", "center", "list", "squares", "format width"])
def test_memory_is_refused_before_it_is_taken(outcomes: Outcomes, attack: str) -> None:
    """In templates of ours a step is refused by its operands, before its process meets a limit."""
    assert "OverflowError" in outcomes[attack, "prompt"][0]


@pytest.mark.fault(
    "templates without end",
    injected="a loop that is too long on every row",
    outcome="UsageError after ten rows",
)
def test_a_template_that_is_slow_on_every_row_ends_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_template, "_MOST_SECONDS", 0.05)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{{ x }}"
    template = PromptTemplate(loops, ["x"])
    for _ in range(prompt_template._MOST_SLOW_ROWS - 1):
        with pytest.raises(BadCell, match="takes over"):
            template.render({"x": 1})
    with pytest.raises(UsageError, match="row after row"):
        template.render({"x": 1})


@pytest.mark.parametrize("kind", ["prompt", "chat"])
def test_slow_rows_among_others_end_no_job(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """They were counted over the whole job: ten of a million ended it, wherever they stood."""
    for module in (prompt_template, chat_template):
        monkeypatch.setattr(module, "_MOST_SECONDS", 0.05)
    loops = "{% if x == 's' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    loops += "{% endfor %}{% endif %}{{ x }}"
    cells = [*"sssssssss", "b"] * 2
    if kind == "prompt":
        found: list[Any] = [
            *PromptTemplate(loops, ["x"]).render_all([({"x": cell}, None) for cell in cells])
        ]
    else:
        source = "{% set x = messages[0]['content'] %}" + loops
        tokenizer = SimpleNamespace(special_tokens_map={})
        template = chat_template.ChatTemplate(source, tokenizer, datetime(2026, 1, 1))
        found = [*template.render_all([[{"role": "user", "content": cell}] for cell in cells])]
    assert [text for text in found if isinstance(text, str)] == ["b", "b"]


ATOMS = st.sampled_from(
    ["x", "y", "row", "row.items", "row['a']", "1", "-7", "99999999999", "2.5", "''", "'a%d{}'",
     "none", "true", "[]", "[1, x]", "{'a': x}", "loop.index", "loop.previtem", "namespace()",
     "range(3)", "range(9999999)", "cycler(1)", "self", "super", "caller", "undefined_name", "dict",
     "x.__class__", "joiner()", "fields('x', 'y')", "varargs"]
)  # fmt: skip
OPERATORS = st.sampled_from(
    ["+", "-", "*", "**", "/", "//", "%", "~", "==", "<", "in", "not in", "and", "or", "is"]
)
FILTERS = st.sampled_from(
    ["upper", "list", "join(x)", "center(99999999)", "batch(3)", "first", "tojson", "int", "length",
     "sort", "map('upper')", "attr('__init__')", "format(1)", "groupby('a')", "slice(0)", "xmlattr",
     "round(400)", "indent(x)", "default", "random", "sum", "tojson(99999999)", "truncate(-1)"]
)  # fmt: skip
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.builds("({} {} {})".format, inner, OPERATORS, inner),
        st.builds("({} | {})".format, inner, FILTERS),
        st.builds("{}({})".format, inner, inner),
        st.builds("{}[{}]".format, inner, inner),
        st.builds("({} if {} else {})".format, inner, inner, inner),
    ),
    max_leaves=6,
)
BODIES = st.recursive(
    st.one_of(st.builds("{{{{ {} }}}}".format, EXPRESSIONS), st.text("a{}%#\n-", max_size=4)),
    lambda inner: st.one_of(
        st.builds("{}{}".format, inner, inner),
        st.builds("{{% for x in {} %}}{}{{% else %}}{{% endfor %}}".format, EXPRESSIONS, inner),
        st.builds("{{% if {} %}}{}{{% endif %}}".format, EXPRESSIONS, inner),
        st.builds("{{% set y = {} %}}{}".format, EXPRESSIONS, inner),
        st.builds("{{% set y %}}{}{{% endset %}}".format, inner),
        st.builds("{{% macro row(x) %}}{}{{% endmacro %}}".format, inner),
        st.builds("{{% call row() %}}{}{{% endcall %}}".format, inner),
        st.builds("{{% filter {} %}}{}{{% endfilter %}}".format, FILTERS, inner),
        st.builds("{{% raw %}}{}".format, inner),
    ),
    max_leaves=5,
)


def check_chance(source: str) -> None:
    """Gives a text or a named error."""
    secret = "a secret of the row"
    try:
        template = PromptTemplate(source + "{{ x }}", ["x", "y", "row"])
        text = template.render({"x": secret, "y": [1, None], "row": {"a": secret, "items": 2}})
        assert isinstance(text, str)
    except (BadCell, UsageError) as error:
        assert secret not in str(error)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(BODIES)
def test_a_template_of_chance_gives_a_text_or_a_named_error(source: str) -> None:
    """Seen red: with a list of the faults that Jinja raises (a filter's AssertionError is none)."""
    check_chance(source)


@pytest.mark.slow
@settings(deadline=None, max_examples=200, derandomize=True)
@given(BODIES)
def test_many_templates_of_chance_do(source: str) -> None:
    check_chance(source)
