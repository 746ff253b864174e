"""The audit of runs that reused documents: is the mode computed right, how far is it from plain."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.audit.auditing import audit_run, describe_audit
from pipeline.cli.tables import audit_table
from pipeline.engine.base import NO_HOOKS, EngineHooks, Indices, RunControl
from pipeline.engine.load import make_engine
from pipeline.engine.prefix_engine import PrefixEngine
from pipeline.engine.verify.segment_faults import SEGMENT_FAULTS, SegmentFault, spoil
from pipeline.errors import RunDirectoryError
from pipeline.location import Location
from pipeline.model.adapter import Card, TrainedMode, save_adapter
from pipeline.model.identity import identify_model
from pipeline.plan.documents import Reuse
from pipeline.plan.plan import Plan
from pipeline.records import Completion
from pipeline.run import run_job, write_report
from pipeline.settings import AuditSettings, JobSettings, ModelSettings
from tests.tiny_job import answers, write_model

EVERY_ROW = AuditSettings(audit_sample="100%", audit_free_running=3)
NO_ARMS = EVERY_ROW.model_copy(update={"audit_arms": 0})
pytestmark = pytest.mark.usefixtures("few_faults")
DOCUMENTS = [" the sky is blue.", " grass is green, mostly.", " snow.", " the sea has salt in it."]
ORDERS = [(0, 1, 2), (2, 0), (3, 1, 0), (1,), (), (0, 0, 3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sharper than at random, so that another place of a document changes what is said."""
    return write_model(tmp_path_factory.mktemp("model"), sharpness=12.0)


def write_table(path: Path) -> Path:
    rows = [
        [
            {"text": "say:", "role": "system"},
            *({"text": DOCUMENTS[number], "role": "document"} for number in order),
            {"text": f" what is {index}?", "role": "query"},
        ]
        for index, order in enumerate(ORDERS)
    ]
    pq.write_table(pa.table({"id": [f"r{i}" for i in range(len(rows))], "segments": rows}), path)
    return path


def settings_of(model: Path, **flat: object) -> JobSettings:
    common: dict[str, object] = {
        "model": str(model),
        "max_new_tokens": 12,
        "ignore_eos": True,
        "dtype": "float32",
    }
    return JobSettings.from_flat(common | {"calibration_rows": 0} | flat)


@pytest.mark.parametrize("flat", [
    {"reuse": "concat"},
    {"reuse": "concat", "document_context": "alone", "temperature": 1.0},
    {"reuse": "epic", "epic_tokens": 3},
    {"reuse": "cacheblend", "blend_share": 0.3},
])  # fmt: skip
def test_a_run_in_each_mode_passes_and_is_told_apart_from_full_attention(
    tmp_path: Path, model: Path, flat: dict[str, object]
) -> None:
    source = write_table(tmp_path / "rows.parquet")
    run_job(str(source), tmp_path / "out", settings_of(model, **flat))
    verdict = audit_run(Location(tmp_path / "out"), EVERY_ROW)
    assert verdict.passed, verdict.reasons
    summary = describe_audit(Location(tmp_path / "out"))
    assert summary["classes"]["identical"] == len(ORDERS)
    assert summary["arms"]["product"]["kl_max"] < 1e-6 < summary["attention"]["kl_max"]
    assert 0 < summary["faults"]["changed_an_answer"] == summary["faults"]["caught"]
    rows = pl.read_parquet(tmp_path / "out" / "audit" / "audit.parquet").sort("row_index")
    kl = rows["audit_full_kl"].to_list()
    if flat.get("document_context") != "alone":
        assert max(kl[3:5]) < 1e-9, "one document below the preamble, and none, are exact"
        assert rows["audit_full_same"].to_list()[3:5] == [True, True]
    assert max(kl) > 1e-2 and rows["audit_full_top1"].is_between(0, 1).all()


def write_adapter(folder: Path, model: Path, mode: TrainedMode) -> Path:
    """Two soft tokens that change what is said, though nobody has trained them."""
    identity = identify_model(ModelSettings(model=str(model)))
    card = Card(
        model=identity, mode=mode, soft_tokens=2, data_sha256="", agreement=1.0, kl=0.0,
        kl_untrained=0.0, document_tokens=[5, 20, 40], most_documents=3, seed=0, training={},
    )  # fmt: skip
    shape = Reuse(mode, 0, soft_tokens=2).soft_rows, 32
    save_adapter(folder, card, np.random.default_rng(0).normal(size=shape).astype(np.float32))
    return folder


@pytest.mark.parametrize("mode", ["packet", "kvlink"])
def test_a_run_with_an_adapter_passes(tmp_path: Path, model: Path, mode: TrainedMode) -> None:
    """Seen red: the reference did not know the soft tokens, so no such run could begin."""
    adapter = write_adapter(tmp_path / "adapter", model, mode)
    source = write_table(tmp_path / "rows.parquet")
    flat = {"reuse": mode, "adapter": str(adapter), "document_context": "preamble"}
    run_job(str(source), tmp_path / "out", settings_of(model, **flat))
    verdict = audit_run(Location(tmp_path / "out"), EVERY_ROW)
    assert verdict.passed, verdict.reasons
    summary = describe_audit(Location(tmp_path / "out"))
    assert summary["classes"]["identical"] == len(ORDERS)
    assert summary["arms"]["product"]["kl_max"] < 1e-6 < summary["attention"]["kl_max"]
    assert 0 < summary["faults"]["changed_an_answer"] == summary["faults"]["caught"]
    page = Path(write_report(Location(tmp_path / "out"))["page"]).read_text(encoding="utf-8")
    table = dict(audit_table(summary))
    assert table["full attention"].endswith(" nats") and "in shared documents" in page
    assert "How far is the mode itself from full attention?" in page
    rows = answers(tmp_path / "out").sort("row_index")
    per_document = 4 if mode == "packet" else 2
    assert rows["link_tokens"].to_list() == [per_document * len(order) for order in ORDERS]
    assert rows["exact"].to_list() == [not order for order in ORDERS]


class SpoiltEngine(PrefixEngine):
    """Sees documents with a fault."""

    fault: SegmentFault

    def generate(
        self, plan: Plan, sequences: Indices, control: RunControl, hooks: EngineHooks = NO_HOOKS
    ) -> Iterator[Completion]:
        if plan.documents is not None:
            plan = replace(plan, documents=spoil(plan.documents, self.fault))
        return super().generate(plan, sequences, control, hooks)


@pytest.mark.parametrize("fault", SEGMENT_FAULTS[:2])
def test_a_run_that_saw_documents_wrongly_fails(
    tmp_path: Path, model: Path, fault: SegmentFault
) -> None:
    def make_spoilt(settings: JobSettings) -> PrefixEngine:
        sound = make_engine(settings)
        assert isinstance(sound, PrefixEngine)
        engine = SpoiltEngine(sound.loaded, settings.engine, sound.backend)
        engine.fault = fault
        return engine

    source = write_table(tmp_path / "rows.parquet")
    run_job(str(source), tmp_path / "out", settings_of(model, reuse="concat"), None, make_spoilt)
    assert not audit_run(Location(tmp_path / "out"), NO_ARMS).passed


@pytest.mark.parametrize("reuse", ["prefix", "concat"])
def test_documents_in_the_best_order_are_audited_in_it(
    tmp_path: Path, model: Path, reuse: str
) -> None:
    """Seen red: with the order of the input a row is corrupt."""
    flat: dict[str, object] = {"model": str(model), "reuse": reuse, "document_order": "best"}
    flat |= {"max_new_tokens": 4, "calibration_rows": 0, "device": "cpu"}
    source = write_table(tmp_path / "rag.parquet")
    run_job(str(source), tmp_path / "out", JobSettings.from_flat(flat))
    verdict = audit_run(Location(tmp_path / "out"), NO_ARMS)
    assert verdict.passed and sum(verdict.classes.values()) == len(ORDERS)
    plan = tmp_path / "out" / "plan" / "plan.parquet"
    whole = pl.read_parquet(plan)
    for broken in (
        whole.drop("document_order"),
        whole.with_columns(document_order=pl.lit([0, 0])),
    ):
        broken.write_parquet(plan)
        with pytest.raises(RunDirectoryError, match="does not say in which order"):
            audit_run(Location(tmp_path / "out"), NO_ARMS)


class Guessing(PrefixEngine):
    """Gives log-probabilities that are not the model's."""

    def generate(self, *args: Any, **kwargs: Any) -> Iterator[Completion]:
        for done in super().generate(*args, **kwargs):
            wrong = [said._replace(logprob=said.logprob - 0.5) for said in done.logprobs]
            yield replace(done, logprobs=tuple(wrong))


def test_logprobs_of_rows_with_documents_are_judged_by_their_mode(
    tmp_path: Path, model: Path
) -> None:
    """Seen red: they were not looked at."""
    source = write_table(tmp_path / "p.parquet")
    settings = settings_of(model, reuse="concat", logprobs=1)
    run_job(str(source), tmp_path / "out", settings)
    verdict = audit_run(Location(tmp_path / "out"), NO_ARMS)
    assert verdict.passed, verdict.reasons
    found = describe_audit(Location(tmp_path / "out"))["logprobs"]
    assert found["rows"] == len(ORDERS) and found["max_deviation"] < 1e-4

    def guess(chosen: JobSettings) -> PrefixEngine:
        honest = make_engine(chosen)
        assert isinstance(honest, PrefixEngine)
        return Guessing(honest.loaded, honest.settings, honest.backend, honest.costs)

    run_job(str(source), tmp_path / "wrong", settings, None, guess)
    verdict = audit_run(Location(tmp_path / "wrong"), NO_ARMS)
    assert not verdict.passed and any("log-probability" in why for why in verdict.reasons)
