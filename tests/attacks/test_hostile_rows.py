"""One row never stops a job: rows of every hostile kind at every stage, between rows that are fine.

The kinds stand in tables by the form of the input; the last tests draw cells by chance.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.audit.auditing import audit_run
from pipeline.errors import InputError, UsageError
from pipeline.generation import resolve_sampling
from pipeline.job.job import open_job
from pipeline.job.planning import plan_rows
from pipeline.job.prepare import Preparing
from pipeline.location import Location
from pipeline.run import plan_job, run_job, validate_input
from pipeline.settings import AuditSettings, JobSettings
from pipeline.tokens.answer_text import AnswerText
from pipeline.tokens.tokenizer import PromptTokenizer
from tests.tiny_job import answers, echo_settings, write_model, write_tokenizer

CANARY = "canary"
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TURNS = [{"role": "user", "content": "hi"}]
DEEP = "[" * 100_000
HALF = "\ud800"


def job(folder: Path, **flat: Any) -> JobSettings:
    (folder / "chat.jinja").write_text(CHAT)
    model = write_tokenizer(folder / "model")
    flat = {"max_new_tokens": 4, "rows_per_part": 2, "fail_on_error": "1"} | flat
    return echo_settings(model, chat_template=folder / "chat.jinja", **flat)


def check(source: Path, folder: Path, error_type: str, **flat: Any) -> str:
    """Run rows of which the middle one cannot: it is an error, its neighbours are answered."""
    settings = job(folder, **flat)
    run_job(str(source), folder / "out", settings)
    assert run_job(str(source), folder / "out", settings).was_complete
    rows = answers(folder / "out")
    assert rows["status"].to_list() == ["ok", "error", "ok"]
    assert rows["error_type"].to_list() == [None, error_type, None]
    message: str = rows["error_message"][1]
    assert CANARY not in message and "\n" not in message and len(message) > 15
    return message


def between(good: Any, bad: Any, kind: pa.DataType | None = None) -> pa.Array:
    return pa.array([good, bad, good], kind)


def said(**fields: Any) -> str:
    return json.dumps(fields)


CELLS: dict[str, tuple[dict[str, pa.Array], str]] = {
    "null": ({"prompt": between("p", None)}, "NullPrompt"),
    "empty": ({"prompt": between("p", "")}, "EmptyPrompt"),
    "null id": ({"id": pa.array(["a", None, "c"])}, "NullId"),
    "null id of a number": ({"id": pa.array([1, None, 3])}, "NullId"),
    "id of bytes": ({"id": pa.array([b"a", b"\xff", b"c"])}, "BadId"),
    **{
        f"sampling {name}": ({"sampling_params": between(None, cell)}, "BadSamplingParams")
        for name, cell in {
            "no JSON": "{canary",
            "too deep": DEEP,
            "a list": "[1]",
            "a number of 5,000 digits": f'{{"seed": {"9" * 5000}}}',
            "text for a number": said(temperature=CANARY),
            "NaN": '{"temperature": NaN}',
            "infinite": '{"temperature": 1e999}',
            "top_p of 0": said(top_p=0),
            "seed of 71 bits": said(seed=2**70),
            "top_k of 71 bits": said(top_k=2**70),
            "top_k of -2": said(top_k=-2),
            "limit of 64 bits": said(max_tokens=2**63),
            "limit below 1": said(max_tokens=0),
            "limits that differ": said(max_tokens=4, max_completion_tokens=5),
            "half a surrogate": said(stop=HALF),
            "an empty stop": said(stop=["a", ""]),
            "unknown": said(canary=1),
            "an unknown half": '{"\\ud800": 1}',
            "tools": said(tools=[{"type": "function", "function": {"name": CANARY}}]),
        }.items()
    },
    "a column's temperature": ({"temperature": between(0.0, float("nan"))}, "BadSamplingParams"),
    "a column's limit": ({"max_tokens": between(4, 0)}, "BadSamplingParams"),
    "a column's fraction": ({"max_new_tokens": between(4.0, 1.5)}, "BadSamplingParams"),
    "a column's penalty": ({"presence_penalty": between(0.0, 2.5)}, "BadSamplingParams"),
    "a column's stop": ({"stop": between(["x"], [""])}, "BadSamplingParams"),
    "a column's format": (
        {"response_format": between('{"type": "text"}', '{"type": "json_object"}')},
        "BadSamplingParams",
    ),
}


@pytest.mark.fault(
    "a row that cannot run, at any stage",
    injected="cells of every hostile kind: prompts, ids, sampling fields, columns, conversations, "
    "templates, JSON lines, batch requests, and libraries that raise or panic on one row",
    outcome="that row is an error with its type and a sentence; the job goes on",
)
@pytest.mark.parametrize("kind", CELLS)
def test_a_hostile_cell_is_its_rows_error(tmp_path: Path, kind: str) -> None:
    """Seen red: null ids, ids of bytes, 2^70 (a panic, an overflow), penalties (ignored)."""
    columns, error_type = CELLS[kind]
    table = pa.table({"prompt": pa.array(["one", "two", "three"]), **columns})
    pq.write_table(table, tmp_path / "in.parquet")
    check(tmp_path / "in.parquet", tmp_path, error_type)


def turn(**fields: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "hi"} | fields]


CONVERSATIONS: dict[str, object] = {
    "null": None,
    "no JSON": "{canary",
    "too deep": DEEP,
    "a number": "1",
    "no turn": "[]",
    "turns of text": json.dumps([CANARY]),
    "no role": json.dumps([{"content": CANARY}]),
    "no content": json.dumps(turn(content=None)),
    "content of numbers": json.dumps(turn(content=5)),
    "parts of nothing": json.dumps(turn(content=[None])),
    "an image": json.dumps(turn(content=[{"type": "image_url", "image_url": {"url": CANARY}}])),
    "half a surrogate": json.dumps(turn(content=HALF)),
    "half in a role": json.dumps(turn(role=HALF)),
    "half in a name": '[{"role": "user", "content": "a", "\\ud800": "b"}]',
    "calls of tools": json.dumps(turn(tool_calls=[{"function": {"name": CANARY}}])),
}


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_a_hostile_conversation_is_its_rows_error(tmp_path: Path, kind: str) -> None:
    good, bad = json.dumps(TURNS), CONVERSATIONS[kind]
    pq.write_table(pa.table({"messages": between(good, bad)}), tmp_path / "in.parquet")
    check(tmp_path / "in.parquet", tmp_path, "NullPrompt" if bad is None else "BadMessages")


FAR = 2**62
PRINTED: dict[str, pa.Array] = {
    "a date after Python's": between(1, FAR // 10**4).cast(pa.timestamp("ms")),
    "a day after Python's": between(1, 10**7, pa.int32()).cast(pa.date32()),
    "a time with a zone": between(1, FAR // 10**4).cast(pa.timestamp("ms", "Europe/Berlin")),
    "a duration": between(1, FAR).cast(pa.duration("ms")),
    "a date in a list": between([1], [10**7], pa.list_(pa.int32())).cast(pa.list_(pa.date32())),
    "bytes that are no text": between(b"ab", b"\xff"),
    "null": between("a", None),
    "a list of null": between(["a"], None),
}


@pytest.mark.parametrize("kind", PRINTED)
def test_a_hostile_value_in_a_template_is_its_rows_error(tmp_path: Path, kind: str) -> None:
    """Seen red: a date of the year 300,000 ended the job (an OverflowError), bytes printed."""
    column = PRINTED[kind]
    (tmp_path / "t.j2").write_text("value {{ x }}")
    pq.write_table(pa.table({"x": column}), tmp_path / "in.parquet")
    check(tmp_path / "in.parquet", tmp_path, "TemplateError", template=tmp_path / "t.j2")


FAILURES = {
    "divides": "{{ 1 / x }}",
    "recurses": "{% macro f() %}{{ f() }}{% endmacro %}{{ x if x else f() }}",
    "fills the memory": "{{ x if x else 'a' * 10**10 }}",
    "prints half a surrogate": "{{ x if x else '\\ud800' }}",
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_template_that_fails_on_a_row_is_its_error(tmp_path: Path, kind: str) -> None:
    (tmp_path / "t.j2").write_text(FAILURES[kind])
    pq.write_table(pa.table({"x": between(1, 0)}), tmp_path / "in.parquet")
    check(tmp_path / "in.parquet", tmp_path, "TemplateError", template=tmp_path / "t.j2")


def write_lines(path: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


LINES: dict[str, dict[str, Any]] = {
    "half a surrogate": {"prompt": HALF},
    "half in a name": {"prompt": "p", HALF: 1},
    "a number of 71 bits": {"prompt": "p", "more": 2**70},
    "two of them": {"prompt": "p", "more": 2**70, "tags": [HALF]},
}


@pytest.mark.parametrize("kind", LINES)
def test_a_hostile_line_is_its_rows_error(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen red: each of them ended the job, by `Unicode...`, `OverflowError`, `ArrowInvalid`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    good = {"prompt": "p", "more": 1}
    source = write_lines(tmp_path / "in.jsonl", good, LINES[kind], good)
    assert "line 2 of" in check(source, tmp_path, "BadRequest")
    assert "coppice_refused" not in answers(tmp_path / "out").columns


def request(**change: Any) -> dict[str, Any]:
    body = {"model": "m", "messages": TURNS}
    line = {"custom_id": "x", "method": "POST", "url": "/v1/chat/completions", "body": body}
    return line | change


REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "no messages": (request(body={}), "no messages"),
    "no body": (request(body=None), "body an object"),
    "another place": (request(url="/v1/embeddings"), "url must be"),
    "another kind": (request(url="/v1/completions", body={"prompt": "p"}), "another kind"),
    "a number for a name": (request(custom_id=5), "custom_id must be text"),
    "half a name": (request(custom_id=HALF), "half a surrogate"),
    "a limit of text": (request(body={"messages": TURNS, "max_tokens": CANARY}), "whole number"),
    "a limit of 71 bits": (request(body={"messages": TURNS, "max_tokens": 2**70}), "whole number"),
    "four fields": (
        request(
            body={
                "messages": TURNS,
                "echo": True,
                "functions": [1],
                "prompt_logprobs": 1,
                "canary?": 1,
            }
        ),  # fmt: skip
        "echo, functions, prompt_logprobs, 1 field that coppice does not know",
    ),
}


@pytest.mark.parametrize("kind", REQUESTS)
def test_a_hostile_request_is_its_rows_error(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen red: the file was refused, for the first of four fields."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bad, reason = REQUESTS[kind]
    source = write_lines(tmp_path / "in.jsonl", request(custom_id="a"), bad, request(custom_id="c"))
    message = check(source, tmp_path, "BadRequest")
    assert "line 2 of" in message and reason in message
    bad_id = bad["custom_id"] if kind not in ("a number for a name", "half a name") else None
    assert answers(tmp_path / "out")["id"].to_list() == ["a", bad_id or "in.jsonl:0:1", "c"]


def test_a_file_without_any_row_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the wrong file, or for another server."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lines = [request(custom_id=name, url="/v1/embeddings") for name in "ab"]
    source = write_lines(tmp_path / "in.jsonl", *lines)
    with pytest.raises(InputError, match="line 1 of .*url must be"):
        open_job(str(source), job(tmp_path))


class PanicException(BaseException):
    """As a library of Rust raises it."""


PanicException.__module__ = "pyo3_runtime"


@pytest.mark.parametrize("num_good", [0, 1])
def test_a_part_of_failed_rows_alone_is_written(tmp_path: Path, num_good: int) -> None:
    """Seen red: "unexpected IndexError", after all others were answered, and at each resume."""
    prompts = ["", None] * 3 + ["good"] * num_good
    pq.write_table(pa.table({"prompt": pa.array(prompts, "string")}), tmp_path / "in.parquet")
    settings = job(tmp_path, rows_per_part=2, fail_on_error="6")
    outcome = run_job(str(tmp_path / "in.parquet"), tmp_path / "out", settings)
    assert (outcome.rows_failed, outcome.counters["rows_ok"]) == (6, num_good)
    assert answers(tmp_path / "out")["error_type"].to_list()[:2] == ["EmptyPrompt", "NullPrompt"]


def test_an_audit_of_failed_rows_alone_says_that_there_is_nothing_to_audit(tmp_path: Path) -> None:
    """Seen red: "unexpected ValueError", of a run that had ended well."""
    pq.write_table(pa.table({"prompt": ["", ""]}), tmp_path / "in.parquet")
    flat = {"model": str(write_model(tmp_path / "model")), "fail_on_error": "2"}
    run_job(str(tmp_path / "in.parquet"), tmp_path / "out", JobSettings.from_flat(flat))
    with pytest.raises(UsageError, match=r"no row of .*out was answered.*failed\.parquet"):
        audit_run(Location(tmp_path / "out"), AuditSettings())


def refuse_one(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    error: BaseException,
    bad: Any,
    of: type = PromptTokenizer,
) -> None:
    """Let the method raise where `bad` is among what it is given."""
    whole = getattr(of, name)

    def method(self: Any, *given: Any) -> Any:
        lists = [items for items in given if isinstance(items, Sequence)]
        if bad in [i if isinstance(i, str) else tuple(i) for items in lists for i in items]:
            raise error
        return whole(self, *given)

    monkeypatch.setattr(of, name, method)


RAISED = [PanicException("canary"), RuntimeError("canary"), MemoryError(), KeyError("canary")]


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_a_prompt_on_which_tokenising_fails_is_its_rows_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Seen red: 12 million spaces under Llama's regex, a panic, at every resume."""
    refuse_one(monkeypatch, "encode_batch", error, "bad")
    pq.write_table(pa.table({"prompt": between("good", "bad")}), tmp_path / "in.parquet")
    check(tmp_path / "in.parquet", tmp_path, "BadPrompt")


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_an_answer_that_is_no_text_is_its_rows_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Whether it is written, or is the beginning of a prompt that a plan looks at."""
    model = write_tokenizer(tmp_path / "model")
    tokenizer = PromptTokenizer.load(str(model), None, job(tmp_path).tokens)
    bad = tuple(tokenizer.encode_batch(["dad"]).flat.tolist()[::-1])
    refuse_one(monkeypatch, "decode_batch", error, bad)
    refuse_one(monkeypatch, "decode", error, bad, AnswerText)
    pq.write_table(pa.table({"prompt": between("good", "dad")}), tmp_path / "in.parquet")
    assert plan_job(str(tmp_path / "in.parquet"), job(tmp_path)).summary.rows == 3
    check(tmp_path / "in.parquet", tmp_path, "BadAnswer")


@pytest.mark.parametrize("error", [OverflowError("canary"), RecursionError(), ValueError("top_k")])
def test_parameters_on_which_the_settings_fail_are_their_rows_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from pipeline.job import prepare

    whole = resolve_sampling

    def resolve(settings: Any, config: Any, override: dict[str, object]) -> Any:
        if override.get("top_k") == 7:
            raise error
        return whole(settings, config, override)

    monkeypatch.setattr(prepare, "resolve_sampling", resolve)
    cells = between(said(top_k=5), said(top_k=7))
    table = pa.table({"prompt": ["a", "b", "c"], "sampling_params": cells})
    pq.write_table(table, tmp_path / "in.parquet")
    if isinstance(error, ValueError):
        error = ValueError("top_k is not good")
    check(tmp_path / "in.parquet", tmp_path, "BadSamplingParams")


def test_who_stops_a_job_is_not_taken_for_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_one(monkeypatch, "encode_batch", KeyboardInterrupt(), "bad")
    pq.write_table(pa.table({"prompt": between("good", "bad")}), tmp_path / "in.parquet")
    with pytest.raises(KeyboardInterrupt):
        plan_rows(open_job(str(tmp_path / "in.parquet"), job(tmp_path)))


def test_a_batch_with_one_bad_row_is_halved_and_not_taken_apart(tmp_path: Path) -> None:
    from pipeline.job.row_faults import call_by_halves

    calls: list[int] = []

    def double(items: Sequence[int]) -> list[int]:
        calls.append(len(items))
        if 700 in items:
            raise ValueError
        return [2 * item for item in items]

    found = dict(call_by_halves(double, range(2048)))
    assert isinstance(found.pop(700), ValueError) and len(calls) < 30
    ordered = [value for start in sorted(found) for value in found[start]]  # type: ignore[union-attr]
    assert ordered == [2 * item for item in range(2048) if item != 700]
    assert list(found) == sorted(found)


JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(),
        st.text(st.characters(), max_size=5), st.sampled_from(["", HALF, "user", "text", "NaN"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                ["role", "content", "type", "text", "tool_calls", "temperature", "top_p", "top_k",
                 "seed", "stop", "max_tokens", "max_new_tokens", "n", "tools", "logit_bias",
                 "response_format", "metadata", "ignore_eos", "more", HALF]
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=8,
)  # fmt: skip
CELL = st.one_of(st.none(), st.text(max_size=9), JSON.map(json.dumps))
DRAWN = settings(
    deadline=None,
    max_examples=40,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def check_neighbours(source: Path, preparation: Preparing, settings: JobSettings) -> None:
    """Rows 0 and 2 are what they are without the row between; that one is tokens or an error."""
    job = open_job(str(source), settings)
    (batch,) = job.source.iter_prompts()
    prepared = preparation.prepare(batch)
    assert prepared.lengths[0] and prepared.lengths[2] and not prepared.rejected.keys() & {0, 2}
    assert (prepared.lengths[1] > 0) != (1 in prepared.rejected)
    for bad in prepared.rejected.values():
        assert bad.error_type and bad.message
        bad.message.encode()
    plan_rows(job)


@DRAWN
@given(messages=CELL, sampling=CELL)
def test_cells_of_chance_leave_their_neighbours_alone(
    tmp_path: Path, messages: str | None, sampling: str | None
) -> None:
    settings = job(tmp_path)
    good = json.dumps(TURNS)
    table = pa.table(
        {
            "messages": between(good, messages, pa.string()),
            "sampling_params": between(None, sampling, pa.string()),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    preparation = open_job(str(tmp_path / "in.parquet"), settings).preparation()
    check_neighbours(tmp_path / "in.parquet", preparation, settings)


BODY = st.dictionaries(
    st.sampled_from(["messages", "model", "n", "stop", "max_tokens", "temperature", "seed", "x"]),
    JSON,
    max_size=4,
)


@DRAWN
@given(body=st.one_of(JSON, BODY, BODY.map(lambda body: {"messages": TURNS} | body)), name=JSON)
def test_requests_of_chance_leave_their_neighbours_alone(
    tmp_path_factory: pytest.TempPathFactory, body: Any, name: Any
) -> None:
    folder = tmp_path_factory.mktemp("requests")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        settings = job(folder)
        line = json.dumps(request(custom_id=name, body=body))
        lines = [request(custom_id="a"), line, request(custom_id="c")]
        if name in ("a", "c"):
            return  # ids that come twice are the file's fault
        source = write_lines(folder / "in.jsonl", *lines)
        try:
            json.loads(line, parse_constant=lambda _: 1 / 0)
        except ZeroDivisionError:
            with pytest.raises(InputError, match="which JSON does not have"):
                open_job(str(source), settings)
            return
        preparation = open_job(str(source), settings).preparation()
        check_neighbours(source, preparation, settings)


def test_validate_names_each_kind_of_rejection(tmp_path: Path) -> None:
    prompts = [*["p"] * 3, *[None] * 4, ""]
    cells = [said(n=2), *[None] * 7]
    pq.write_table(pa.table({"prompt": prompts, "sampling_params": cells}), tmp_path / "in.parquet")
    found = validate_input(str(tmp_path / "in.parquet"), job(tmp_path))
    assert found["reasons"] == {"NullPrompt": 4, "BadSamplingParams": 1, "EmptyPrompt": 1}
    shown = {example["error_type"] for example in found["examples"]}
    assert shown == set(found["reasons"]) and len(found["examples"]) == 5
