"""Rows that cannot be scored, or only with care: each is a row error or done, and says so."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.engine.base import Engine
from pipeline.engine.load import make_engine
from pipeline.errors import InputError, ModelError, RunDirectoryError
from pipeline.inputs.conversion import convert
from pipeline.job.job import open_job
from pipeline.location import Location
from pipeline.records import Scored
from pipeline.run import plan_job, run_job
from pipeline.settings import JobSettings
from tests.test_scores import check_row, settings_of
from tests.tiny_job import answers, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("attacked") / "model", sharpness=3.0)


def run(
    model: Path, folder: Path, table: pa.Table, make: Any = make_engine, **flat: Any
) -> list[dict[str, Any]]:
    pq.write_table(table, folder / "in.parquet")
    asked = settings_of(model, fail_on_error="100%", **flat)
    run_job(str(folder / "in.parquet"), folder / "out", asked, make_engine=make)
    return answers(folder / "out").to_dicts()


def of_choices(*cells: Any, prompts: list[str | None] | None = None) -> pa.Table:
    kind = pa.list_(pa.string())
    prompts = ["so what?"] * len(cells) if prompts is None else prompts
    return pa.table({"prompt": prompts, "choices": pa.array(cells, kind)})


def test_each_kind_of_choices_is_done_or_an_error(model: Path, tmp_path: Path) -> None:
    cells = [["a", "b"], None, [], ["only"], ["a", "a"], ["a", None], ["a", ""], ["b", "a", "b"]]
    rows = run(model, tmp_path, of_choices(*cells), choices_column="choices")
    status = [row["status"] for row in rows]
    assert status == ["ok", "error", "error", "ok", "ok", "error", "error", "ok"]
    said = {row["row_index"]: (row["error_type"], row["error_message"]) for row in rows}
    assert said[1] == ("BadChoices", "the column 'choices' is null")
    assert said[2] == ("BadChoices", "choices holds no choice")
    assert said[5] == ("BadChoices", "choice 1 is null")
    assert said[6] == ("BadChoices", "choice 1 is empty")
    for row in rows:
        if row["status"] == "ok":
            check_row(model, row)
    assert rows[3]["probabilities"] == [1.0]
    assert rows[4]["probabilities"] == [0.5, 0.5] and rows[4]["choice_index"] == 0
    mass = {math.exp(value) for value in rows[7]["loglikelihoods"]}
    assert rows[7]["label_mass"] == pytest.approx(sum(mass))  # a token counts once


def test_choices_as_json_text_are_read_row_by_row(model: Path, tmp_path: Path) -> None:
    cells = ['["a", "b"]', "a,b", "[1, 2]", '{"a": 1}', "null", '["\\ud800"]', "[" * 5000]
    table = pa.table({"prompt": ["so"] * len(cells), "choices": cells})
    rows = run(model, tmp_path, table, choices_column="choices")
    assert [row["status"] for row in rows] == ["ok"] + ["error"] * (len(cells) - 1)
    assert all(row["error_type"] == "BadChoices" for row in rows[1:])
    assert "choice 0 is of type int, not text" in rows[2]["error_message"]


def test_lines_with_lists_of_several_types_are_rows_or_errors(model: Path, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"choices": ["a", "b"]},
        {"choices": ["a", 1]},
        {"choices": "a"},
        {"choices": None},
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"prompt": "so", **line}) + "\n" for line in lines))
    asked = settings_of(model, choices_column="choices", fail_on_error="100%")
    run_job(str(source), tmp_path / "out", asked)
    found = answers(tmp_path / "out")["status"].to_list()
    assert found == ["ok", "error", "error", "error"]


@pytest.mark.parametrize(
    ("kind", "flat", "said"),
    [
        (pa.list_(pa.int64()), {"choices_column": "c"}, "list of strings"),
        (pa.int64(), {"choices_column": "c"}, "list of strings"),
        (pa.struct([("a", pa.string())]), {"choices_column": "c"}, "list of strings"),
        (pa.list_(pa.string()), {"continuation_column": "c"}, "not string"),
        (pa.int64(), {"continuation_column": "c"}, "not string"),
        (pa.string(), {"choices_column": "d"}, "has no column 'd'.*correct --choices-column"),
    ],
)
def test_a_column_of_another_type_is_refused_by_name(
    model: Path, tmp_path: Path, kind: pa.DataType, flat: dict[str, Any], said: str
) -> None:
    table = pa.table({"prompt": ["a"], "c": pa.array([None], kind)})
    pq.write_table(table, tmp_path / "in.parquet")
    with pytest.raises(InputError, match=said):
        open_job(str(tmp_path / "in.parquet"), settings_of(model, **flat))


def test_a_last_token_that_the_model_does_not_know_is_seen_before_it_runs(tmp_path: Path) -> None:
    """Seen red: it is fed nowhere, so nobody looked at it, and reading its logits failed."""
    model = write_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps(config | {"vocab_size": config["vocab_size"] - 1})
    )
    pq.write_table(of_choices(["a", "a\n"]), tmp_path / "in.parquet")
    with pytest.raises(ModelError, match="tokenizer and model do not belong together"):
        plan_job(str(tmp_path / "in.parquet"), settings_of(model, choices_column="choices"))


def test_contexts_that_are_null_or_empty(model: Path, tmp_path: Path) -> None:
    table = of_choices(["a", "b"], ["a"], [" a"], prompts=[None, "", "  "])
    rows = run(model, tmp_path, table, choices_column="choices")
    assert rows[0]["error_type"] == "NullPrompt"
    check_row(model, rows[1])
    check_row(model, rows[2])


def test_a_prompt_without_a_token_has_no_perplexity(model: Path, tmp_path: Path) -> None:
    table = pa.table({"prompt": ["", "a"]})
    rows = run(model, tmp_path, table, prompt_logprobs=True)
    assert [row["status"] for row in rows] == ["error", "ok"]


def test_a_model_without_first_token_needs_a_context(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    table = of_choices(["a"], ["a"], prompts=["", "b"])
    rows = run(model, tmp_path, table, choices_column="choices")
    assert [row["status"] for row in rows] == ["error", "ok"]
    assert rows[0]["error_type"] == "NoFirstToken" and "BOS, EOS" in rows[0]["error_message"]


@pytest.mark.parametrize("on_overlong", ["error", "truncate-left"])
def test_what_exceeds_the_context(model: Path, tmp_path: Path, on_overlong: str) -> None:
    prompts: list[str | None] = ["x" * 127, "x" * 128, "x" * 300, "y", "y"]
    cells = [["ab"], ["ab", "a"], ["ab", "abc"], ["a" * 128], ["a" * 129]]
    table = of_choices(*cells, prompts=prompts)
    asked = {"choices_column": "choices", "on_overlong": on_overlong}
    rows = run(model, tmp_path, table, **asked)
    check_row(model, rows[0])
    check_row(model, rows[3])
    if on_overlong == "error":
        found = [(r["status"], r["error_type"]) for r in rows]
        bad = ("error", "OverlongPrompt")
        assert found == [("ok", None), bad, bad, ("ok", None), bad]
        return
    assert [row["status"] for row in rows] == ["ok"] * 4 + ["error"]
    assert rows[4]["error_type"] == "OverlongContinuation"
    assert [row["cut_tokens"] for row in rows[:4]] == [0, 1, 173 + 174, 0]
    check_row(model, rows[2] | {"prompt": "x" * 127, "choices": ["ab"], **first_of(rows[2])})
    planned = plan_job(str(tmp_path / "in.parquet"), settings_of(model, **asked))
    assert planned.summary.scores is not None and planned.summary.scores["rows_cut"] == 2


def first_of(row: dict[str, Any]) -> dict[str, Any]:
    lists = ("loglikelihoods", "token_counts", "byte_counts", "greedy")
    first = {name: row[name][:1] for name in lists}
    return first | {"choice": "ab", "choice_index": 0, "probabilities": [1.0]}


def test_ten_thousand_choices_in_a_row(model: Path, tmp_path: Path) -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = [a + b + c for a in letters for b in letters for c in letters][:10_000]
    rows = run(model, tmp_path, of_choices(texts, ["a"]), choices_column="choices")
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert len(rows[0]["loglikelihoods"]) == 10_000
    assert sum(rows[0]["probabilities"]) == pytest.approx(1.0)
    some = range(0, 10_000, 1999)
    best = max(some, key=lambda i: rows[0]["loglikelihoods"][i])
    few: dict[str, Any] = {
        name: [rows[0][name][i] for i in some]
        for name in ("loglikelihoods", "token_counts", "greedy", "byte_counts", "choices")
    }
    weights = [math.exp(v - max(few["loglikelihoods"])) for v in few["loglikelihoods"]]
    few |= {"probabilities": [w / sum(weights) for w in weights]}
    few |= {"choice_index": list(some).index(best), "choice": texts[best]}
    check_row(model, rows[0] | few)


def test_continuations_that_begin_as_others_or_are_other_rows_contexts(
    model: Path, tmp_path: Path
) -> None:
    cells = [["a", "ab", "abc", "b"], ["c", "ca"], ["a", "bc"], ["bc", "a"]]
    prompts: list[str | None] = ["so", "soab", "soa", "s"]
    rows = run(model, tmp_path, of_choices(*cells, prompts=prompts), choices_column="choices")
    for row in rows:
        check_row(model, row)


class _Bent:
    """Another engine whose scores are bent before they leave it."""

    def __init__(self, engine: Engine, bend: Any) -> None:
        self._engine, self._bend = engine, bend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, *arguments: Any) -> Any:
        yield from map(self._bend, self._engine.generate(*arguments))


def bending(bend: Any) -> Any:
    def make(settings: JobSettings) -> Any:
        return _Bent(make_engine(settings), bend)

    return make


def test_probabilities_of_zero_are_told_from_numbers(model: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    def never(completion: Any) -> Any:
        scores = tuple(Scored((-math.inf,), False) for _ in completion.scores)
        return replace(completion, scores=scores)

    table = of_choices(["a", "b"])
    rows = run(model, tmp_path, table, bending(never), choices_column="choices")
    assert rows[0]["error_type"] == "NoLikelyChoice" and rows[0]["loglikelihoods"] is None


def test_logits_that_are_no_numbers_are_a_row_error(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = write_model(tmp_path / "model")
    network = AutoModelForCausalLM.from_pretrained(model)
    weight = network.get_input_embeddings().weight
    with torch.no_grad():
        weight[20] = math.nan
    network.save_pretrained(model)
    table = of_choices(["a", "b"], ["a", "b"], prompts=["stu", "ab"])
    rows = run(model, tmp_path, table, choices_column="choices", kernels="torch")
    assert rows[0]["error_type"] == "NonFiniteLogits" and rows[0]["choice"] is None
    assert rows[1]["status"] == "ok"


def test_a_row_that_fails_in_one_choice_fails_whole(model: Path, tmp_path: Path) -> None:
    table = of_choices(["a", "bcdefghijk" * 9], ["a"], ["b"])
    rows = run(model, tmp_path, table, choices_column="choices", kv_budget="20KiB", max_rows=1)
    found = [(row["status"], row["error_type"]) for row in rows]
    assert found == [("error", "KVBudgetExceeded"), ("ok", None), ("ok", None)]
    assert rows[0]["loglikelihoods"] is None and rows[0]["cached_tokens"] == 0


def test_columns_of_sampling_are_carried_and_not_obeyed(model: Path, tmp_path: Path) -> None:
    table = of_choices(["a", "b"], ["a", "b"]).append_column("temperature", pa.array([-1.0, 9e9]))
    pq.write_table(table, tmp_path / "in.parquet")
    job = open_job(str(tmp_path / "in.parquet"), settings_of(model, choices_column="choices"))
    said = [line for line in job.describe() if "temperature" in line]
    assert said == ["not used, since nothing is generated: the columns temperature"]
    rows = run(model, tmp_path, table, choices_column="choices")
    assert [row["status"] for row in rows] == ["ok", "ok"] and rows[0]["temperature"] == -1.0


def test_input_columns_named_like_the_output_are_kept(model: Path, tmp_path: Path) -> None:
    table = of_choices(["a", "b"]).append_column("choice", pa.array(["mine"]))
    rows = run(model, tmp_path, table, choices_column="choices")
    assert rows[0]["input_choice"] == "mine" and rows[0]["choice"] in ("a", "b")
    assert rows[0]["choices"] == ["a", "b"]


def test_tenants_share_nothing(model: Path, tmp_path: Path) -> None:
    cells = [["a", "b"]] * 4
    table = of_choices(*cells).append_column("tenant", pa.array(["x", "y", "x", None]))
    pq.write_table(table, tmp_path / "in.parquet")
    asked = settings_of(model, choices_column="choices")
    planned = plan_job(str(tmp_path / "in.parquet"), asked)
    assert planned.plan.scores is not None
    assert planned.plan.scores.num_points == planned.summary.sequences == 3
    rows = run(model, tmp_path, table, choices_column="choices")
    assert [row["dedup_of"] is None for row in rows] == [True, True, False, True]
    assert pl.DataFrame(rows)["loglikelihoods"].n_unique() == 1


def test_a_row_that_a_library_fails_on_is_told_from_the_others(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.tokens.text_encoder import TextEncoder

    encode = TextEncoder.encode

    def failing(self: TextEncoder, texts: list[str], **flags: bool) -> list[list[int]]:
        if any("boom" in text for text in texts):
            raise RuntimeError("SECRET boom")
        return encode(self, texts, **flags)

    monkeypatch.setattr(TextEncoder, "encode", failing)
    cells = [["a"], ["a", "boom"], ["b"], ["c"]]
    rows = run(model, tmp_path, of_choices(*cells), choices_column="choices")
    assert [row["status"] for row in rows] == ["ok", "error", "ok", "ok"]
    assert rows[1]["error_type"] == "BadPrompt" and "SECRET" not in rows[1]["error_message"]


def test_what_is_too_long_to_be_tokenised_is_a_row_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.tokens.text_encoder._MOST_LETTERS", 500)
    table = of_choices(["a"], ["a" * 600], ["b"], prompts=["x", "y", "z" * 501])
    rows = run(model, tmp_path, table, choices_column="choices", on_overlong="keep")
    assert [row["status"] for row in rows] == ["ok", "error", "error"]
    assert all("too long to be tokenised" in row["error_message"] for row in rows[1:])


def test_scores_are_no_responses(model: Path, tmp_path: Path) -> None:
    """Seen red: each was a response with status 200 and no text."""
    run(model, tmp_path, of_choices(["a", "b"]), choices_column="choices")
    with pytest.raises(RunDirectoryError, match="has scores, which no response"):
        convert(Location(str(tmp_path / "out")), Location(str(tmp_path / "r.jsonl")))
    assert not (tmp_path / "r.jsonl").exists()
