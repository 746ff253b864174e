"""Audits of rows over documents that ask for more than the likeliest token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.audit.auditing import audit_run, describe_audit
from pipeline.engine.naive_engine import NaiveEngine
from pipeline.errors import InputError
from pipeline.location import Location
from pipeline.records import SamplingParams
from pipeline.run import run_job
from tests.audit.conftest import few_faults
from tests.audit.test_documents import NO_ARMS, model, settings_of, write_adapter, write_table
from tests.engine import tiny
from tests.job.test_calibration import write_table as rows_in_all_orders

__all__ = ["few_faults", "model"]
pytestmark = pytest.mark.usefixtures("few_faults")


@pytest.mark.parametrize(
    "asked",
    [
        {"logit_bias": '{"5": 5.0}', "frequency_penalty": 0.9},
        {"allowed_token_ids": [3, 4, 5, 6, 7]},
        {"sampling_params": '{"structured_outputs": {"regex": "[a-c]{3,9}e"}}'},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_what_rows_ask_is_asked_of_the_slow_mode_too(
    tmp_path: Path, model: Path, asked: dict[str, Any]
) -> None:
    """Seen red: sound runs failed, since rows that run freely knew nothing of biases and bans."""
    source = write_table(tmp_path / "in.parquet")
    table = pq.read_table(source)
    for name, value in asked.items():
        table = table.append_column(name, [[value] * len(table)])
    pq.write_table(table, source)
    run_job(str(source), tmp_path / "out", settings_of(model, reuse="concat"))
    verdict = audit_run(Location(tmp_path / "out"), NO_ARMS)
    assert verdict.passed, verdict.reasons
    assert describe_audit(Location(tmp_path / "out"))["free_running"]["rows"] == 3


@pytest.mark.fault(
    "prompts in segments",
    injected="documents of unlike lengths in the best order, in every mode; afterwards another "
    "adapter in the place of the run's",
    outcome="the audit passes; the adapter is named as what has changed, exit code 2",
)
@pytest.mark.parametrize("reuse", ["prefix", "concat", "epic", "cacheblend", "packet"])
def test_rows_in_the_best_order_are_cut_where_their_documents_end(
    tmp_path: Path, model: Path, reuse: str
) -> None:
    """Seen red: prompts were put in the order of the run, and cut as the input has them."""
    source = rows_in_all_orders(tmp_path / "in.parquet")
    adapter = write_adapter(tmp_path / "adapter", model, "packet") if reuse == "packet" else None
    flat: dict[str, Any] = {"document_order": "best", "max_new_tokens": 5}
    settings = settings_of(model, reuse=reuse, adapter=adapter, **flat)
    run_job(str(source), tmp_path / "out", settings)
    verdict = audit_run(Location(tmp_path / "out"), NO_ARMS)
    assert verdict.passed, verdict.reasons
    if adapter is not None:
        card = adapter / "card.json"
        card.write_text(card.read_text().replace('"seed": 0', '"seed": 1'))
        with pytest.raises(InputError, match="the adapter in .* changed since the run"):
            audit_run(Location(tmp_path / "out"), NO_ARMS)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(9, rules='{"repetition_penalty": 1.9, "no_repeat_ngram_size": 2}'),
        SamplingParams(9, asked='{"logit_bias": {"7": 30.0}, "stop_token_ids": [7]}'),
        SamplingParams(9, asked='{"stop_token_ids": [5, 6, 7, 8, 9, 10, 11]}', ignore_eos=True),
    ],
    ids=["rules", "bias and stop token", "stop token alone"],
)
def test_a_baseline_with_logits_of_its_own_writes_what_plain_generation_does(
    params: SamplingParams,
) -> None:
    naive = NaiveEngine(tiny.load_tiny("llama"))
    prompt = np.random.default_rng(0).integers(4, tiny.VOCABULARY, 20).tolist()
    writer = naive.writer(prompt, params)
    while not writer.is_over:
        writer.choose(naive.forced_logits(prompt, [*writer.output, 0])[-1])
    assert tuple(writer.output) == naive.generate_one(prompt, params)
