"""Documents from the input to plan, output and resume; no engine here computes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.engine.base import (
    NO_HOOKS,
    EngineCapabilities,
    EngineHooks,
    Indices,
    RunControl,
)
from pipeline.engine.echo_engine import EchoEngine
from pipeline.errors import CoppiceError, EngineError, RunDirectoryError, UsageError
from pipeline.inputs import parquet_input
from pipeline.job.job import open_job
from pipeline.job.planning import PlannedJob, plan_rows
from pipeline.job.planning_checkpoint import Checkpoint
from pipeline.location import Location
from pipeline.model.adapter import Card, save_adapter
from pipeline.plan.document_order import run_order
from pipeline.plan.documents import Reuse
from pipeline.plan.plan import Plan
from pipeline.records import Completion, Timing
from pipeline.run import plan_job, run_job, validate_input, write_report
from pipeline.settings import JobSettings
from tests.job.preparing import fail_after, watch_prepared
from tests.tiny_job import answers, on, write_prompts

Row = tuple[str, list[str], str]
DOCUMENTS = ["the first document. ", "and a second one. ", "number three. ", "four? "]
ROWS: list[Row] = [
    ("answer: ", [DOCUMENTS[0], DOCUMENTS[1]], "why?"),
    ("answer: ", [DOCUMENTS[1], DOCUMENTS[0], DOCUMENTS[2]], "how?"),
    ("answer: ", [DOCUMENTS[2], DOCUMENTS[1]], "why?"),
    ("answer: ", [DOCUMENTS[3]], "who?"),
    ("", [], "nothing to read"),
    ("answer: ", [DOCUMENTS[0], DOCUMENTS[1]], "why?"),
]


def write_rows(path: Path, rows: list[Row] = ROWS, **columns: Any) -> Path:
    """A column of segments, ids r0, r1, ..."""
    segments = [
        [{"role": "system", "text": system}, *({"role": "document", "text": d} for d in documents),
         {"role": "query", "text": query}]
        for system, documents, query in rows
    ]  # fmt: skip
    ids = [f"r{row}" for row in range(len(rows))]
    pq.write_table(pa.table({"id": ids, "segments": segments, **columns}), path)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "in.parquet")


@pytest.fixture
def flat(model_folder: Path) -> dict[str, Any]:
    defaults = {"max_new_tokens": 4, "rows_per_part": 2, "device": "cpu", "calibration_rows": 0}
    return defaults | {"model": str(model_folder)}


def planned(source: Path, flat: dict[str, Any], **more: Any) -> PlannedJob:
    return plan_job(str(source), JobSettings.from_flat(flat | more))


def text_of(row: Row) -> str:
    system, documents, query = row
    return system + "".join(documents) + query


def distinct(texts: list[list[str]]) -> int:
    """Characters, each of which is a token, of all beginnings of these paths."""
    paths = ["".join(path) for path in texts]
    return len({path[: end + 1] for path in paths for end in range(len(path))})


def test_segments_by_prefix_are_the_prompts_in_one_piece(
    tmp_path: Path, source: Path, flat: Any
) -> None:
    """To the plan's hash, which stands for all that runs."""
    joined = write_prompts(tmp_path / "joined.parquet", list(map(text_of, ROWS)))
    one, other = planned(source, flat), planned(joined, flat)
    assert one.summary.plan_hash == other.summary.plan_hash
    assert one.summary.documents and not other.summary.documents
    assert one.frame().equals(other.frame())


def test_the_plan_counts_what_each_way_computes(source: Path, flat: Any) -> None:
    figures = planned(source, flat, reuse="concat").summary.documents
    assert figures is not None
    distinct_rows = ROWS[:-1]
    prefix = distinct([[text_of(row)] for row in distinct_rows])
    encoded = distinct([[row[0], d] for row in distinct_rows for d in row[1]])
    own = sum(len(row[2]) for row in distinct_rows)
    assert figures["in_given_order"] == prefix
    assert figures["at_any_position"] == figures["by_this_mode"] == encoded + own
    best = [[1, 0], [1, 0, 2], [1, 2]]  # (uses - 1) x tokens: 3 x 18, 2 x 20, 1 x 14
    ordered = [
        [row[0], *(DOCUMENTS[n] for n in order), row[2]]
        for row, order in zip(ROWS, [*best, [3], [], best[0]], strict=True)
    ]
    assert figures["in_best_order"] == distinct(ordered)
    assert (figures["distinct"], figures["uses"]) == (4, 8)
    assert figures["tokens"] == sum(map(len, DOCUMENTS))
    summary = planned(source, flat, reuse="concat").summary
    assert summary.unique_tokens == encoded + own
    assert summary.saving == 1 - summary.unique_tokens / sum(len(text_of(row)) for row in ROWS)
    epic = planned(source, flat, reuse="epic", epic_tokens=3).summary
    assert epic.unique_tokens == encoded + own + 3 * 4  # of every document but the first ones
    assert summary.plan_hash != epic.plan_hash


def test_the_best_order_changes_the_prompts_and_the_plan_says_how(source: Path, flat: Any) -> None:
    best = planned(source, flat, document_order="best")
    given = planned(source, flat).summary.documents
    decode = best.job.tokenizer.decode_batch
    texts = decode([best.plan.table[row].tolist() for row in range(len(ROWS))])
    second, first, third = DOCUMENTS[1], DOCUMENTS[0], DOCUMENTS[2]
    assert texts[:2] == [f"answer: {second}{first}why?", f"answer: {second}{first}{third}how?"]
    order = best.frame().sort("row_index")["document_order"].to_list()
    assert order == [[1, 0], [0, 1, 2], [1, 0], [0], [], [1, 0]]
    assert best.summary.documents is not None and given is not None
    names = ("in_given_order", "in_best_order", "at_any_position", "distinct", "uses")
    assert [best.summary.documents[n] for n in names] == [given[n] for n in names]
    assert best.summary.unique_tokens == given["in_best_order"] < given["in_given_order"]
    shown = validate_input(str(source), best.job.settings)["first"]
    assert shown["rendered"] == texts[0] and decode([shown["token_ids"]]) == texts[:1]


LONG = "a long one of fifty letters or some more of them "


@pytest.mark.parametrize(
    ("documents", "says"),
    [
        ([[DOCUMENTS[0]]] * 2, "prefix saves as much"),
        ([[d] for d in DOCUMENTS], "prefix saves as much"),
        ([[DOCUMENTS[0]] * 2] * 9, "prefix is enough"),
        ([[DOCUMENTS[i % 4][:5], LONG] for i in range(9)], "the best order is enough"),
        ([[DOCUMENTS[(i + j) % 4] for j in range(3)] for i in range(6)], "approximate"),
    ],
)
def test_the_advice_is_the_cheapest_way_that_is_enough(
    tmp_path: Path, flat: Any, documents: list[list[str]], says: str
) -> None:
    rows = [("", some, f"{number}?") for number, some in enumerate(documents)]
    figures = planned(write_rows(tmp_path / "in.parquet", rows), flat).summary.documents
    assert figures is not None and says in figures["text"]


@pytest.mark.fault(
    "prompts in segments",
    injected="Ctrl-C in the middle of planning",
    outcome="the next call goes on and comes to the same documents, order and plan",
)
@pytest.mark.parametrize("order", ["given", "best"])
def test_an_interrupted_plan_keeps_the_segments(
    tmp_path: Path, flat: Any, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(parquet_input, "BATCH_ROWS", 5)
    monkeypatch.setattr(Checkpoint, "every_rows", 10)
    rows = [(p, d, f"{q} {n}") for n in range(6) for p, d, q in ROWS]
    source = write_rows(tmp_path / "in.parquet", rows, tenant=["a", None, "b"] * 12)
    settings = JobSettings.from_flat(flat | {"reuse": "concat", "document_order": order})
    whole = plan_rows(open_job(str(source), settings))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        fail_after(patch, 5, KeyboardInterrupt())
        plan_rows(open_job(str(source), settings))
    prepared = watch_prepared(monkeypatch)
    again = plan_rows(open_job(str(source), settings))
    assert prepared[0] == 20 and again.summary == whole.summary
    assert again.frame().equals(whole.frame())


@pytest.mark.fault(
    "prompts in segments",
    injected="documents that exceed the model's context, with soft tokens or without; "
    "--on-overlong truncate-left",
    outcome="OverlongPrompt, error of that row; cutting is refused before a row is read",
)
def test_documents_beyond_the_context_are_an_error_of_their_row(tmp_path: Path, flat: Any) -> None:
    rows = [("", ["x" * 60, "y" * 60], "fits?"), ("", ["x" * 70, "y" * 70], "too long"), ROWS[0]]
    source = write_rows(tmp_path / "in.parquet", rows)
    found = plan_rows(open_job(str(source), JobSettings.from_flat(flat | {"reuse": "concat"})))
    assert found.rejected.keys() == {1} and found.rejected[1].error_type == "OverlongPrompt"
    assert found.plan.params[int(found.plan.sequences.params[0])].max_new_tokens <= 4
    assert found.plan.table.lengths.tolist() == [125, 0, len(text_of(ROWS[0]))]
    assert found.counts is not None and found.counts.documents.tolist() == [2, 0, 2]
    for mode in ("prefix", "concat"):
        with pytest.raises(UsageError, match="truncate-left would cut preambles and documents"):
            planned(source, flat, reuse=mode, on_overlong="truncate-left")


class MovingEngine(EchoEngine):
    """Counts as an engine does that encodes each document once; echoes."""

    capabilities = EngineCapabilities(computes_once=True, shows_logits=True, moves_documents=True)

    def _completions(
        self, plan: Plan, sequences: Indices, control: RunControl, hooks: EngineHooks = NO_HOOKS
    ) -> Iterator[Completion]:
        documents = plan.documents
        assert documents is not None
        every = np.arange(len(plan.sequences))
        users, bounds = documents.users(every)
        node = np.repeat(np.arange(documents.tree.num_nodes), np.diff(bounds))
        there: set[int] = set()
        for sequence in run_order(documents, sequences).tolist():
            needed = node[users == sequence].tolist()
            own = int(documents.own.lengths[sequence])
            new = sum(int(documents.tree.edge_lengths[n]) for n in needed if n not in there)
            there.update(needed)
            self.counters.prefilled_tokens += new + own
            prompt = plan.prompt_token_ids(sequence)
            last = int(documents.run_length[documents.run_bounds[sequence + 1] - 1])
            end = int(documents.prompt_ends[sequence])
            repaired = own - last if end == len(prompt) else 0  # else it is links
            cached = end + repaired - new - own
            yield Completion(sequence, tuple(prompt[-3:].tolist()), "stop", cached, Timing())


@pytest.mark.parametrize("mode", ["concat", "epic"])
def test_rows_say_what_was_done_with_their_documents(
    tmp_path: Path, source: Path, flat: Any, mode: str
) -> None:
    """The session checks what the engine counts against the plan. Seen red: without the tokens that
    are computed again."""
    settings = JobSettings.from_flat(flat | {"reuse": mode, "calibration_rows": 0})
    run_job(str(source), tmp_path / "out", settings, make_engine=on(MovingEngine()))
    found = answers(tmp_path / "out")
    columns = ["reuse_mode", "exact", "documents", "document_tokens", "link_tokens"]
    assert found.select(columns).rows() == [
        (mode, len(documents) < 2, len(documents), len("".join(documents)), 0)
        for _, documents, _ in ROWS
    ]
    assert found["fallback_reason"].is_null().all() and found["dedup_of"].to_list()[-1] == "r0"
    repaired = [8, 16, 8, 0, 0, 0] if mode == "epic" else [0] * 6
    assert found["repaired_tokens"].to_list() == repaired
    assert found["segments"].to_list()[0][1] == {"role": "document", "text": DOCUMENTS[0]}
    assert "`reuse_mode`" in (tmp_path / "out" / "README.md").read_text()
    tree = pl.read_parquet(tmp_path / "out" / "plan" / "tree.parquet")
    groups = found.filter(pl.col("group_id").is_not_null()).join(
        tree, left_on="group_id", right_on="node"
    )
    ends = {row: len("answer: ") + len(DOCUMENTS[n]) for row, n in ((0, 1), (1, 1), (2, 1), (5, 1))}
    assert dict(groups.select("row_index", "end").iter_rows()) == ends


def write_adapter(folder: Path, source: Path, flat: dict[str, Any], mode: Any) -> Path:
    """Two soft tokens a document, or two before and two after it; untrained."""
    job = open_job(str(source), JobSettings.from_flat(flat))
    assert job.shape is not None
    card = Card(
        model=job.model_identity, mode=mode, soft_tokens=2, data_sha256="0", agreement=1.0, kl=0.0,
        kl_untrained=0.0, document_tokens=[1, 2, 3], most_documents=4, seed=0, training={},
    )  # fmt: skip
    rows = Reuse(mode, 0, soft_tokens=2).soft_rows
    save_adapter(folder, card, np.zeros((rows, job.shape.hidden_size), np.float32))
    return folder


@pytest.mark.parametrize("mode", ["kvlink", "packet"])
def test_an_adapter_adds_its_tokens(tmp_path: Path, source: Path, flat: Any, mode: str) -> None:
    adapter = write_adapter(tmp_path / "adapter", source, flat, mode)
    settings = JobSettings.from_flat(flat | {"reuse": mode, "adapter": str(adapter)})
    run_job(str(source), tmp_path / "out", settings, make_engine=on(MovingEngine()))
    found = answers(tmp_path / "out")
    each = {"kvlink": 2, "packet": 4}[mode]
    assert found["link_tokens"].to_list() == [each * len(row[1]) for row in ROWS]
    assert found["repaired_tokens"].sum() == 0 and not found["exact"][3]  # documents are alone
    wrong = "packet" if mode == "kvlink" else "kvlink"
    other = write_adapter(tmp_path / "other", source, flat, wrong)
    with pytest.raises(CoppiceError, match=wrong):
        planned(source, flat, reuse=mode, adapter=str(other))
    (adapter / "rows.safetensors").write_bytes(b"")
    with pytest.raises(CoppiceError, match="damaged"):
        planned(source, flat, reuse=mode, adapter=str(adapter))


@pytest.mark.fault(
    "prompts in segments",
    injected="41 documents in a row with --reuse kvlink",
    outcome="TooManyDocuments, error of that row; other modes run it",
)
def test_more_documents_than_there_are_links_for_are_an_error_of_their_row(
    tmp_path: Path, flat: Any
) -> None:
    forty = list("abcdefghij") * 4
    source = write_rows(tmp_path / "in.parquet", [("", forty, "q"), ("", [*forty, "k"], "q")])
    adapter = write_adapter(tmp_path / "adapter", source, flat, "kvlink")
    links = {"reuse": "kvlink", "adapter": str(adapter), "on_overlong": "keep"}
    rejected = plan_rows(open_job(str(source), JobSettings.from_flat(flat | links))).rejected
    assert {row: bad.error_type for row, bad in rejected.items()} == {1: "TooManyDocuments"}
    others = JobSettings.from_flat(flat | {"reuse": "concat"})
    assert not plan_rows(open_job(str(source), others)).rejected


def test_the_report_says_what_was_computed_of_documents(
    tmp_path: Path, source: Path, flat: Any
) -> None:
    settings = JobSettings.from_flat(flat | {"reuse": "epic"})
    run_job(str(source), tmp_path / "out", settings, make_engine=on(MovingEngine()))
    write_report(Location(tmp_path / "out"))
    page = (tmp_path / "out" / "report.html").read_text()
    seen = sum(len("".join(documents)) for _, documents, _ in ROWS)
    assert f'data-key="document_tokens" data-value="{seen}"' in page
    assert f'data-key="repaired_tokens" data-value="{8 + 16 + 8}"' in page
    assert "<code>--reuse epic</code>" in page and "4 of them distinct" in page
    assert "Prefixes of the prompts" not in page  # rows lie below several nodes
    run_job(str(source), tmp_path / "plain", JobSettings.from_flat(flat | {"engine": "echo"}))
    write_report(Location(tmp_path / "plain"))
    page = (tmp_path / "plain" / "report.html").read_text()
    assert "<code>--reuse prefix</code>" in page and "Prefixes of the prompts" in page


def test_a_run_by_prefix_says_so_too(tmp_path: Path, source: Path, flat: Any) -> None:
    settings = JobSettings.from_flat(flat | {"engine": "echo"})
    run_job(str(source), tmp_path / "out", settings)
    found = answers(tmp_path / "out")
    assert found["reuse_mode"].to_list() == ["prefix"] * 6 and found["exact"].all()
    assert found["documents"].to_list() == [len(row[1]) for row in ROWS]
    assert found["repaired_tokens"].sum() == 0
    joined = write_prompts(tmp_path / "joined.parquet", list(map(text_of, ROWS)))
    run_job(str(joined), tmp_path / "plain", settings)
    plain = answers(tmp_path / "plain")
    assert plain["generated_text"].equals(found["generated_text"])
    assert "reuse_mode" not in plain.columns and "documents" not in plain.columns


def test_an_engine_that_moves_no_documents_refuses_them(
    tmp_path: Path, source: Path, flat: Any
) -> None:
    settings = JobSettings.from_flat(flat | {"reuse": "concat"})
    with pytest.raises(EngineError, match="choose --reuse prefix"):
        run_job(str(source), tmp_path / "out", settings, make_engine=on(EchoEngine()))


@pytest.mark.fault(
    "prompts in segments",
    injected="the same run resumed with another --reuse, context, order or number of tokens",
    outcome="RunDirectoryError naming the field, exit code 2; --reuse prefix has the id of before",
)
@pytest.mark.parametrize(
    ("before", "after", "field"),
    [
        ({"reuse": "concat"}, {"reuse": "epic"}, "epic_tokens"),
        ({"reuse": "concat"}, {}, "document_context"),
        ({"reuse": "concat"}, {"reuse": "concat", "document_context": "alone"}, "document_context"),
        ({"reuse": "epic"}, {"reuse": "epic", "epic_tokens": 9}, "epic_tokens"),
        ({"reuse": "concat"}, {"reuse": "concat", "document_order": "best"}, "document_order"),
    ],
)
def test_a_resume_in_another_mode_is_refused(
    tmp_path: Path, source: Path, flat: Any, before: Any, after: Any, field: str
) -> None:
    engine = on(MovingEngine())
    flat = flat | {"calibration_rows": 0}
    run_job(str(source), tmp_path / "out", JobSettings.from_flat(flat | before), make_engine=engine)
    with pytest.raises(RunDirectoryError, match=f"another {field}"):
        run_job(str(source), tmp_path / "out", JobSettings.from_flat(flat | after))
    fingerprint = json.loads((tmp_path / "out" / "run.json").read_bytes())["fingerprint"]
    assert fingerprint["reuse"] == before["reuse"]
    plain = open_job(str(source), JobSettings.from_flat(flat)).fingerprint
    assert not [name for name in plain if "reuse" in name or "document" in name or "epic" in name]


def test_soft_tokens_count_towards_the_context(tmp_path: Path, flat: Any) -> None:
    from pipeline.job.prepare import Limits, Preparation

    job = open_job(str(write_rows(tmp_path / "in.parquet")), JobSettings.from_flat(flat))
    (batch,) = job.source.iter_prompts()
    longest = max(len(text_of(row)) for row in ROWS)
    limits = Limits(longest + 4, "error", "prefix", most_documents=2, soft_tokens=3)
    prepared = Preparation(job.tokenizer, job.settings.sampling, {}, limits).prepare(batch)
    assert {row: bad.error_type for row, bad in prepared.rejected.items()} == {
        1: "TooManyDocuments"
    }
    assert 1 not in prepared.segments and prepared.lengths[1] == 0
    assert prepared.flat.shape == (prepared.lengths.sum(),)
    limits = Limits(longest + 4, "error", "prefix", soft_tokens=3)
    prepared = Preparation(job.tokenizer, job.settings.sampling, {}, limits).prepare(batch)
    assert {row: bad.error_type for row, bad in prepared.rejected.items()} == {1: "OverlongPrompt"}
    assert "truncate-left" in prepared.rejected[1].message
    limits = replace(limits, in_segments=True)  # as of this job, which refuses to shorten them
    assert job.preparation().prepare(batch).rejected == {}
    prepared = Preparation(job.tokenizer, job.settings.sampling, {}, limits).prepare(batch)
    assert prepared.rejected[1].message.endswith("shorten it")
    limits = Limits(longest + 10, "error", "prefix", soft_tokens=3)
    prepared = Preparation(job.tokenizer, job.settings.sampling, {}, limits).prepare(batch)
    assert not prepared.rejected and prepared.lengths.tolist() == [len(text_of(r)) for r in ROWS]
    assert prepared.params[1].max_new_tokens == 1  # of four, three documents have taken nine
