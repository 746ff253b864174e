"""Settings: units, limits, and how they are dealt out to their sections."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.errors import UsageError
from pipeline.settings import AuditSettings, JobSettings, WriteSettings


@pytest.mark.parametrize(
    ("limit", "rows", "allowed"),
    [
        ("0.01", 1000, 10), ("0.01", 99, 0), ("50", 10, 50), ("0", 10, 0), ("1.0", 10, 10),
        ("5%", 1000, 50), ("29%", 100, 29), ("0.29", 100, 29), (0.05, 100, 5), ("0.5 %", 400, 2),
    ],
)  # fmt: skip
def test_failures_allowed_are_a_share_or_a_count(
    limit: str | float, rows: int, allowed: int
) -> None:
    settings = WriteSettings.model_validate({"fail_on_error": limit})
    assert settings.allowed_failures(rows) == allowed


@pytest.mark.parametrize(
    ("sample", "total", "rows"),
    [
        ("200", 1000, 200), ("200", 50, 50), ("1%", 1000, 10), ("1%", 50, 1), ("0", 10, 0),
        ("0.01", 1000, 10), ("0.07", 100, 7), ("1.0", 30, 30),
    ],
)  # fmt: skip
def test_the_audit_sample_is_a_share_or_a_count(sample: str, total: int, rows: int) -> None:
    assert AuditSettings(audit_sample=sample).num_rows(total) == rows


@pytest.mark.parametrize(("said", "share"), [("99%", 0.99), ("0.99", 0.99), (1, 1.0), ("1", 1.0)])
def test_the_bar_of_an_audit_is_written_as_any_share(said: object, share: float) -> None:
    assert AuditSettings.model_validate({"audit_min_exact": said}).audit_min_exact == share


def test_a_flat_mapping_is_dealt_out_to_the_sections() -> None:
    settings = JobSettings.from_flat(
        {"model": "m", "max-new-tokens": 7, "kv_budget": "1MiB", "stop": ["x"], "limit": None}
    )
    assert settings.sampling.max_new_tokens == 7
    assert settings.engine.kv_budget == 1 << 20
    assert settings.sampling.stop == ("x",)
    assert settings.read.limit is None


def test_field_names_are_unique_over_the_sections() -> None:
    sections = [f.annotation for f in JobSettings.model_fields.values()]
    names = [name for section in sections for name in section.model_fields]  # type: ignore[union-attr]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"modle": "m"}, "unknown setting 'modle'"),
        ({"model": "m", "max_rows": 0}, "max-rows"),
        ({"model": "m", "engine": "fast"}, "engine"),
        ({"model": "m", "kv_budget": "lots"}, "kv-budget"),
        ({"model": "m", "fail_on_error": "many"}, "fail-on-error"),
        ({"model": "m", "audit_sample": "half"}, "audit-sample"),
        ({"model": "m", "time_budget": "soon"}, "time-budget"),
        ({"model": "m", "stall_timeout": "-1"}, "stall-timeout"),
        ({"modle": "m"}, "did you mean model"),
        ({"MAX_ROWS": 3}, "did you mean max-rows"),
        ({"nothing-like-it": 3}, "coppice run --help lists them"),
        ({"model": "m", "max_rows": 0}, r"^setting max-rows: must be at least 1 \(got 0\)$"),
        ({"model": "m", "max_rows": "many"}, r"^setting max-rows: must be a whole number"),
        ({"model": "m", "temperature": 101}, r"must be at most 100\.0 \(got 101\)$"),
        ({"model": "m", "engine": "fast"}, r"must be 'prefix', .* or 'echo' \(got 'fast'\)$"),
        (
            {"model": "m", "kv_budget": "lots"},
            "^setting kv-budget: 'lots' is not a size; write.*6$",
        ),
        ({"model": "m", "num_shards": 4}, "^--num-shards 4 cuts the job, so say which part"),
        ({"model": "m", "num_shards": 4, "shard": 4}, "^there is no --shard 4 of --num-shards 4"),
        ({"model": "m", "num_workers": 4}, "^num-workers and ray-address belong to"),
        ({"model": "m", "engine_options": "a=b"}, "^engine-options are for --engine vllm"),
        ({"model": ["m"]}, "^setting model: must be a text$"),
    ],
)
def test_a_wrong_setting_is_named_in_a_persons_words(flat: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        JobSettings.from_flat(flat)


@pytest.mark.parametrize(
    ("said", "seconds"), [("15m", 900.0), (20, 20.0), ("0", 0.0), (0, 0.0), ("None", 0.0)]
)
def test_a_stall_is_so_many_seconds_or_never(said: str | int, seconds: float) -> None:
    settings = JobSettings.from_flat({"model": "m", "stall_timeout": said})
    assert settings.write.stall_timeout == seconds


def test_settings_survive_json() -> None:
    settings = JobSettings.from_flat(
        {"model": "m", "time_budget": "4h", "chat_template": "a.jinja"}
    )
    assert JobSettings.model_validate(settings.model_dump(mode="json")) == settings


def test_settings_cannot_be_changed() -> None:
    settings = JobSettings.from_flat({"model": "m"})
    with pytest.raises(ValidationError, match="frozen"):
        settings.engine.max_rows = 3
