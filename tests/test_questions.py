"""Typed questions of every row, from the file to the columns, against full forwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

import kvcoppice
from pipeline.audit.auditing import audit_run, describe_audit
from pipeline.cli.app import app
from pipeline.engine.base import Engine
from pipeline.engine.load import make_engine
from pipeline.errors import InputError, RunDirectoryError, UsageError
from pipeline.job.job import open_job
from pipeline.job.planning import plan_rows
from pipeline.location import Location
from pipeline.plan_files import write_plan_page
from pipeline.questions import Order
from pipeline.run import plan_job, run_job, validate_input, write_report
from pipeline.settings import AuditSettings, JobSettings
from tests.asked_job import (
    ANSWER,
    QUESTIONS,
    asked_settings,
    check_row,
    sheet_of,
    write_questions,
    write_rows,
)
from tests.test_scores import _Failing
from tests.tiny_job import answers, write_model, write_prompts

COLUMNS = (
    "kind", "kind_probability", "kind_label_mass",
    "sure", "sure_likeliest", "sure_probability", "sure_label_mass",
    "fine", "fine_probability", "fine_label_mass",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("asked") / "model", sharpness=3.0)


def run(model: Path, folder: Path, name: str = "out", **flat: Any) -> pl.DataFrame:
    """Of files `in.parquet` and `q.yaml`."""
    run_job(str(folder / "in.parquet"), folder / name, asked_settings(model, folder, **flat))
    return answers(folder / name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "in.parquet")
    write_questions(tmp_path / "q.yaml", instructions="look:")
    return tmp_path


@pytest.mark.parametrize("order", ["first", "last"])
def test_each_kind_of_question_becomes_its_columns(model: Path, folder: Path, order: Order) -> None:
    asked = asked_settings(model, folder, question_order=order)
    outcome = run_job(str(folder / "in.parquet"), folder / "out", asked)
    rows, sheet = answers(folder / "out"), sheet_of(folder / "q.yaml")
    assert set(COLUMNS) <= set(rows.columns) and rows["status"].to_list() == ["ok"] * 4
    types = [rows.schema[name] for name in ("kind", "sure", "fine", "fine_probability")]
    assert types == [pl.String, pl.Float64, pl.Boolean, pl.Float64]
    for row in rows.iter_rows(named=True):
        check_row(model, row, sheet, order)
    assert outcome.counters["prefilled_tokens"] == outcome.counters["unique_tokens"]
    cached, total = (sum(rows[name].to_list()) for name in ("cached_tokens", "prompt_tokens"))
    assert total - cached == outcome.counters["unique_tokens"]


def test_questions_stand_around_the_text_as_asked(model: Path, folder: Path) -> None:
    found = {}
    for order in ("first", "last"):
        asked = asked_settings(model, folder, question_order=order)
        job = open_job(str(folder / "in.parquet"), asked)
        (batch,) = job.source.iter_prompts()
        found[order] = batch.contents[0].prompts[0].context  # type: ignore[union-attr]
    assert found["first"] == f"look:\n\nwhich of them?\n\na plum is a fruit\n\n{ANSWER}"
    assert found["last"] == f"look:\n\na plum is a fruit\n\nwhich of them?\n\n{ANSWER}"


def test_the_usual_cue_ends_in_a_blank_that_goes_to_the_label(model: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "in.parquet")
    write_questions(tmp_path / "q.yaml", answer=None)
    rows = run(model, tmp_path)
    assert rows["token_counts"].to_list()[0] == [4, 5, 3, 2, 2, 2, 2, 2]  # a blank more each


@pytest.mark.parametrize(
    ("texts", "question", "chosen"),
    [
        ([f"{i} {'long text ' * 6}" for i in range(6)], "why?", "last"),
        ([f"{i}" for i in range(40)], "is this number one that you like, or not so much?", "first"),
        (["the same " * 5] * 40, "is this number one that you like, or not so much?", "last"),
    ],
)
def test_the_order_is_the_one_by_which_the_plan_saves_more(
    model: Path, tmp_path: Path, texts: list[str | None], question: str, chosen: str
) -> None:
    write_rows(tmp_path / "in.parquet", texts)
    one = {"name": "q", "text": question, "kind": "boolean", "labels": ["y", "n"]}
    write_questions(tmp_path / "q.yaml", [one, one | {"name": "r", "text": f"{question} surely?"}])
    unique = {}
    for order in ("first", "last", "auto"):
        asked = asked_settings(model, tmp_path, question_order=order)
        planned = plan_job(str(tmp_path / "in.parquet"), asked)
        unique[order], scores = planned.summary.unique_tokens, planned.summary.scores
    assert scores is not None and scores["question_order"] == chosen
    assert unique["auto"] == unique[chosen] == min(unique.values())
    saving = scores["question_order_saving"]
    assert (saving["first"] > saving["last"]) == (chosen == "first") and saving["rows"] == len(
        texts
    )
    (said,) = [line for line in planned.job.describe() if "questions stand" in line]
    assert f"{saving['last']:.1%} behind it" in said


def test_of_large_files_some_texts_are_counted(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.job.question_ordering._MOST_BYTES", 8000)
    texts: list[str | None] = [f"{i % 30} {'long text ' * 6}" for i in range(90)]
    write_rows(folder / "in.parquet", texts)
    job = open_job(str(folder / "in.parquet"), asked_settings(model, folder))
    assert job.asking is not None and job.asking.order == "last"
    assert 0 < job.asking.rows < 90 and job.asking.rows % 3 == 0  # all of a text, or none


def test_the_order_that_was_chosen_is_recorded_and_asked_for_again(
    model: Path, folder: Path
) -> None:
    run(model, folder)
    with pytest.raises(RunDirectoryError, match="question_order"):
        run(model, folder, question_order="first")
    run(model, folder, question_order="last")  # what was chosen, said: nothing is left to do
    asked = AuditSettings(audit_sample="100%", audit_arms=0)
    assert audit_run(Location(folder / "out"), asked).passed


def test_other_questions_are_another_run(model: Path, folder: Path) -> None:
    run(model, folder)
    write_questions(folder / "q.yaml", QUESTIONS[:2])
    with pytest.raises(RunDirectoryError, match="questions"):
        run(model, folder)
    with pytest.raises(InputError, match="the questions in .*q.yaml changed since the run"):
        audit_run(Location(folder / "out"), AuditSettings())


def test_a_question_that_a_row_cannot_be_asked_is_its_error(model: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "in.parquet", ["a", "b", None, "d"], who=["me", None, "me", "you"])
    write_questions(tmp_path / "q.yaml")
    rows = run(model, tmp_path, fail_on_error="100%").to_dicts()
    assert [row["error_type"] for row in rows] == [None, "BadQuestion", "NullPrompt", None]
    assert rows[1]["error_message"] == (
        "the question 'sure': line 1 of the template prints a null; write {{ name or '' }} where "
        "that means nothing"
    )
    assert rows[1]["kind"] is rows[1]["fine"] is rows[2]["sure"] is None


def test_what_is_too_long_is_an_error_of_its_row(model: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "in.parquet", ["a" * 90, "a" * 120])
    write_questions(tmp_path / "q.yaml")
    rows = run(model, tmp_path, fail_on_error="100%")
    assert rows["error_type"].to_list() == [None, "OverlongPrompt"]
    cut = run(model, tmp_path, "cut", on_overlong="truncate-left")
    assert cut["status"].to_list() == ["ok", "ok"] and cut["cut_tokens"][1] > 0


def test_a_conversation_is_asked_in_its_users_messages(model: Path, tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }} {{ m.content }}\n{% endfor %}assistant\n"
    )
    talk = [
        [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}],
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}],
    ]
    pl.DataFrame({"messages": talk, "who": ["me", "you"]}).write_parquet(tmp_path / "in.parquet")
    write_questions(tmp_path / "q.yaml", QUESTIONS[2:], answer=None, instructions="look:")
    said = {}
    for order in ("first", "last"):
        asked = asked_settings(model, tmp_path, chat_template=template, question_order=order)
        job = open_job(str(tmp_path / "in.parquet"), asked)
        (batch,) = job.source.iter_prompts()
        said[order] = [job.tokenizer.render(c) for c in batch.contents if c is not None]
    assert said["last"] == [
        "system s\nuser look:\n\nhi\n\nis it?\nassistant",
        "user look:\n\nhi\nassistant yes?\nuser is it?\nassistant",
    ]
    assert said["first"] == [
        "system s\nuser look:\n\nis it?\n\nhi\nassistant",
        "user look:\n\nis it?\n\nhi\nassistant yes?\nassistant",
    ]
    rows = run(model, tmp_path, chat_template=template)
    assert rows["status"].to_list() == ["ok", "ok"]
    assert rows["token_counts"].to_list() == [[1, 1], [1, 1]]  # right behind the template's end


def test_a_text_becomes_a_users_message_where_the_template_is_applied(
    model: Path, folder: Path
) -> None:
    template = folder / "t.jinja"
    template.write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    chat = {"chat_template": template, "apply_chat_template": True}
    with pytest.raises(UsageError, match="'answer' stands before the label"):
        open_job(str(folder / "in.parquet"), asked_settings(model, folder, **chat))
    write_questions(folder / "q.yaml", answer=None)
    asked = asked_settings(model, folder, question_order="last", **chat)
    job = open_job(str(folder / "in.parquet"), asked)
    (batch,) = job.source.iter_prompts()
    assert batch.contents[0] is not None
    assert job.tokenizer.render(batch.contents[0]) == "<a plum is a fruit\n\nwhich of them?>"


def test_labels_are_compared_by_their_means(model: Path, folder: Path) -> None:
    rows = run(model, folder, normalize="tokens")
    for row in rows.iter_rows(named=True):
        sums, tokens = row["loglikelihoods"][:3], row["token_counts"][:3]
        means = [a / b for a, b in zip(sums, tokens, strict=True)]
        assert row["kind"] == QUESTIONS[0]["labels"][means.index(max(means))]


def test_a_resumed_job_gives_the_same_table(model: Path, folder: Path) -> None:
    write_rows(folder / "in.parquet", [f"text {i}" for i in range(12)])
    flat: dict[str, Any] = {"rows_per_part": 3, "stall_timeout": "never"}
    whole = run(model, folder, "whole", **flat)

    def failing(settings: JobSettings) -> Engine:
        return _Failing(make_engine(settings))

    asked = asked_settings(model, folder, **flat)
    with pytest.raises(OSError, match="cut off"):
        run_job(str(folder / "in.parquet"), folder / "out", asked, make_engine=failing)
    again = run(model, folder, **flat)
    assert again.select("id", "kind", "fine").equals(whole.select("id", "kind", "fine"))


@pytest.mark.parametrize("order", ["first", "last"])
def test_shards_ask_every_row_once(model: Path, folder: Path, order: Order) -> None:
    """Seen red: with questions first, all rows were in the shard of the first question."""
    write_rows(folder / "in.parquet", [f"{i} text" for i in range(11)])
    asked: dict[str, Any] = {"question_order": order, "num_shards": 3}
    parts = [run(model, folder, str(n), shard=n, **asked) for n in range(3)]
    assert min(map(len, parts)) >= 3
    rows = pl.concat(parts).sort("row_index")
    assert rows["row_index"].to_list() == list(range(11))
    for row in rows.iter_rows(named=True):
        check_row(model, row, sheet_of(folder / "q.yaml"), order)


def test_tenants_share_nothing(model: Path, folder: Path) -> None:
    write_rows(folder / "in.parquet", ["same"] * 3, who=["me"] * 3, tenant=["x", "y", "x"])
    planned = plan_job(str(folder / "in.parquet"), asked_settings(model, folder))
    assert planned.requests is not None
    alone = {int(planned.plan.sequence_of_row[request]) for request in planned.requests.of_row(0)}
    other = {int(planned.plan.sequence_of_row[request]) for request in planned.requests.of_row(1)}
    assert not alone & other
    rows = run(model, folder)
    assert rows["dedup_of"].to_list() == [None, None, "r0"]
    assert rows["sure"].n_unique() == 1


def test_kv_of_an_earlier_run_is_loaded(model: Path, folder: Path) -> None:
    first = run(model, folder, "first", kv_store=folder / "store")
    second = run(model, folder, "second", kv_store=folder / "store")
    assert second["kind"].equals(first["kind"]) and second["fine"].equals(first["fine"])


def test_strict_mode_gives_the_same_bits_in_any_order(model: Path, folder: Path) -> None:
    texts: list[str | None] = [f"text {i % 5}" for i in range(9)]
    write_rows(folder / "in.parquet", texts)
    one = run(model, folder, "one", fidelity="strict").sort("id")
    shuffled = pl.read_parquet(folder / "in.parquet").sample(fraction=1.0, shuffle=True, seed=3)
    shuffled.write_parquet(folder / "in.parquet")
    other = run(model, folder, "other", fidelity="strict", max_batch_tokens=64).sort("id")
    assert one.select("id", *COLUMNS).equals(other.select("id", *COLUMNS))


@pytest.mark.parametrize("flat", [{}, {"fidelity": "strict"}, {"engine": "naive"}])
def test_the_audit_says_of_each_question_whether_the_answer_is_the_same(
    model: Path, folder: Path, flat: dict[str, Any]
) -> None:
    run(model, folder, **flat)
    verdict = audit_run(Location(folder / "out"), AuditSettings(audit_sample="100%"))
    assert verdict.passed, verdict.reasons
    found = describe_audit(Location(folder / "out"))["scores"]
    assert found["rows_with_a_choice"] == found["same_choice"] == 3
    assert list(found["questions"]) == ["kind", "sure", "fine"]
    for one in found["questions"].values():
        assert one["rows"] == one["same_answer"] == 3 and one["delta_max"] < 1e-4


@pytest.mark.parametrize("column", ["kind", "sure", "sure_likeliest", "fine", "fine_probability"])
def test_an_answer_that_does_not_follow_from_its_numbers_fails_the_audit(
    model: Path, folder: Path, column: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.job.question_answers import question_columns

    def forged(*arguments: Any) -> dict[str, Any]:
        found = question_columns(*arguments)
        was: Any = found[column]
        wrong = {bool: lambda: not was, str: lambda: "no" if was != "no" else "bad"}
        found[column] = wrong.get(type(was), lambda: was + 0.25)()
        return found

    monkeypatch.setattr("pipeline.job.answer_table.question_columns", forged)
    run(model, folder)
    assert not audit_run(Location(folder / "out"), AuditSettings(audit_sample="100%")).passed
    questions = describe_audit(Location(folder / "out"))["scores"]["questions"]
    asked = column.split("_")[0]
    assert questions[asked]["same_answer"] == 0
    assert all(one["same_answer"] == 3 for name, one in questions.items() if name != asked)


def test_validate_shows_the_token_ids_of_all_labels(model: Path, folder: Path) -> None:
    found = validate_input(str(folder / "in.parquet"), asked_settings(model, folder))
    shown = found["first"]["continuations"]
    assert [(piece["question"], piece["text"]) for piece in shown] == [
        (question["name"], label) for question in QUESTIONS for label in question["labels"]
    ]
    assert all(len(piece["token_ids"]) == len(piece["text"]) for piece in shown)
    assert found["first"]["rendered"].endswith(f"which of them?\n\n{ANSWER}")


def test_the_report_shows_each_question(model: Path, folder: Path) -> None:
    rows = run(model, folder)
    summary = write_report(Location(folder / "out"))["summary"]
    page = (folder / "out" / "report.html").read_text()
    assert "Each was asked <b>3</b> questions" in page
    for name in ("kind", "sure", "fine"):
        assert f"What was chosen: {name}" in page
        assert f"{name}: rows whose two best labels" in summary
    mean = sum(rows["sure"].to_list()) / 4
    planned = plan_job(str(folder / "in.parquet"), asked_settings(model, folder))
    write_plan_page(planned, "in", folder / "plan.html")
    said = "Each row is asked 3 questions; questions stand behind"
    assert said in (folder / "plan.html").read_text()
    assert f"sure: mean | {mean:.4g} |" in summary
    assert "`kind_label_mass`" in (folder / "out" / "README.md").read_text()


def test_the_api_takes_a_file_or_a_mapping(model: Path, folder: Path) -> None:
    source, path = folder / "in.parquet", folder / "q.yaml"
    options: dict[str, Any] = {"model": model, "dtype": "float32"}
    of_file = kvcoppice.score(source, folder / "a", questions=path, **options)
    mapping = {"instructions": "look:", "answer": ANSWER, "questions": QUESTIONS}
    of_mapping = kvcoppice.score(source, folder / "b", questions=mapping, **options)
    one, other = (found.answers().collect().sort("id") for found in (of_file, of_mapping))
    assert one.select("id", *COLUMNS).equals(other.select("id", *COLUMNS))
    assert of_mapping.audit(audit_sample="100%").passed
    numbers = {"questions": [{"name": "n", "text": "?", "kind": "scale", "labels": [1, 2.5]}]}
    found = kvcoppice.score(source, folder / "c", questions=numbers, **options)
    assert found.answers().collect()["n"].is_between(1, 2.5).all()
    with pytest.raises(UsageError, match="questions are a path or a mapping"):
        kvcoppice.score(source, folder / "d", questions={"questions": {1}}, **options)


def test_the_command_asks_and_says_where_questions_stand(model: Path, folder: Path) -> None:
    common = [str(folder / "in.parquet"), "--model", str(model), "--dtype", "float32"]
    asked = ["--questions", str(folder / "q.yaml"), "--progress", "none"]
    planned = CliRunner().invoke(app, ["plan", *common, *asked], env={"COLUMNS": "200"})
    assert (
        planned.exit_code == 0 and "questions stand behind the text of each row" in planned.output
    )
    done = CliRunner().invoke(app, ["score", *common, *asked, "-o", str(folder / "out")])
    assert done.exit_code == 0, done.output
    for row in answers(folder / "out").iter_rows(named=True):
        check_row(model, row, sheet_of(folder / "q.yaml"))
    audited = CliRunner().invoke(
        app, ["audit", str(folder / "out"), "--audit-sample", "100%"], env={"COLUMNS": "200"}
    )
    assert audited.exit_code == 0 and "3 of 3 the same" in audited.output


def test_a_thousand_questions_are_as_many_branches(model: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "in.parquet", ["a", "b"])
    few = [{"name": f"q{i}", "text": f"{i}?", "kind": "boolean"} for i in range(1000)]
    write_questions(tmp_path / "q.yaml", few)
    planned = plan_rows(open_job(str(tmp_path / "in.parquet"), asked_settings(model, tmp_path)))
    assert planned.requests is not None
    assert np.diff(planned.requests.bounds).tolist() == [2000, 2000]


def test_rows_that_are_json_lines_are_asked_too(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "who": "me"}\n{"prompt": null}\n')
    write_questions(tmp_path / "q.yaml")
    asked = asked_settings(model, tmp_path, fail_on_error="100%")
    run_job(str(tmp_path / "in.jsonl"), tmp_path / "out", asked)
    assert answers(tmp_path / "out")["error_type"].to_list() == [None, "NullPrompt"]


def test_a_name_may_be_of_any_letters(model: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "in.parquet", ["a"])
    write_questions(tmp_path / "q.yaml", [QUESTIONS[2] | {"name": "größe_2"}])
    rows = run(model, tmp_path)
    assert rows["größe_2"].dtype == pl.Boolean and "größe_2_label_mass" in rows.columns
    assert audit_run(Location(tmp_path / "out"), AuditSettings(audit_arms=0)).passed


def test_a_template_makes_the_text_that_is_asked_about(model: Path, tmp_path: Path) -> None:
    write_prompts(tmp_path / "in.parquet", ["x", "y"], who=["me", "you"])
    (tmp_path / "t.j2").write_text("{{ who }} said")
    write_questions(tmp_path / "q.yaml", QUESTIONS[2:])
    asked = asked_settings(model, tmp_path, template=tmp_path / "t.j2", question_order="last")
    job = open_job(str(tmp_path / "in.parquet"), asked)
    (batch,) = job.source.iter_prompts()
    context = batch.contents[1].prompts[0].context  # type: ignore[union-attr]
    assert context == f"you said\n\nis it?\n\n{ANSWER}"
