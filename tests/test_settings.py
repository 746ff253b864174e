"""Settings: units, limits, and where a sampling parameter comes from."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.errors import UsageError
from pipeline.generation import resolve_sampling
from pipeline.records import SamplingParams
from pipeline.sampling_settings import SamplingSettings
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


SECRETS = {"access_key_id": "canary-id", "secret_access_key": "canary-key"}


@pytest.mark.parametrize(
    "written",
    [
        {"region": "eu-west-1", "anonymous": False} | SECRETS,
        ["AWS_REGION=eu-west-1", "anonymous=false", *(f"{k}={v}" for k, v in SECRETS.items())],
    ],
)
def test_secrets_of_a_store_are_used_and_never_shown(written: object) -> None:
    settings = JobSettings.from_flat({"model": "m", "storage-options": written})
    assert settings.store.storage_options["secret_access_key"] == "canary-key"
    dumped = settings.model_dump(mode="json")
    assert dumped["store"] == {"storage_options": {"region": "eu-west-1", "anonymous": "false"}}
    for shown in (str(dumped), settings.model_dump_json(), repr(settings), str(settings)):
        assert "canary" not in shown
    again = JobSettings.model_validate(dumped)  # as the audit does it, with the secrets again
    secrets = JobSettings.from_flat({"model": "m", "storage-options": SECRETS})
    assert again.store.overridden_by(secrets.store) == settings.store


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (["regoin=canary"], "no option 'regoin'; known are endpoint_url, region"),
        (["canary"], "name=value"),
        (7, "name=value"),
        (["access_key_id=canary"], "give both"),
        (["endpoint_url=http://me:canary@host"], "endpoint_url must look like"),
        (["anonymous=canary"], "true or false"),
    ],
)
def test_a_wrong_storage_option_is_named_without_its_value(written: object, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        JobSettings.from_flat({"model": "m", "storage_options": written})
    assert "setting storage-options" in str(error.value) and "canary" not in str(error.value)


def test_settings_cannot_be_changed() -> None:
    settings = JobSettings.from_flat({"model": "m"})
    with pytest.raises(ValidationError, match="frozen"):
        settings.engine.max_rows = 3


@pytest.mark.parametrize(
    ("flags", "repository", "row", "expected"),
    [
        ({}, {}, {}, SamplingParams()),
        (
            {},
            {"do_sample": True, "top_p": 0.9},
            {},
            SamplingParams(temperature=1.0, top_p=0.9, top_k=50),
        ),
        ({}, {"do_sample": False, "temperature": 0.7}, {}, SamplingParams()),
        ({"temperature": 0.0}, {"do_sample": True, "temperature": 0.7}, {}, SamplingParams()),
        ({"max_new_tokens": 9}, {"max_new_tokens": 5}, {}, SamplingParams(max_new_tokens=9)),
        ({"max_new_tokens": 9}, {}, {"max_new_tokens": 3}, SamplingParams(max_new_tokens=3)),
        ({}, {}, {"stop": "x"}, SamplingParams(stop=("x",))),
        ({}, {}, {"stop": ["x", "y"], "top_p": None}, SamplingParams(stop=("x", "y"))),
        ({}, {}, {"top_k": -1}, SamplingParams()),
        ({}, {}, {"seed": 4}, SamplingParams(seed=4)),
    ],
)
def test_the_row_wins_over_flags_over_the_repository(
    flags: dict[str, Any],
    repository: dict[str, Any],
    row: dict[str, object],
    expected: SamplingParams,
) -> None:
    assert resolve_sampling(SamplingSettings(**flags), repository, row) == expected


@pytest.mark.parametrize("row", [{"beams": 2}, {"top_p": 0.0}, {"max_new_tokens": 0}])
def test_a_row_cannot_ask_for_the_impossible(row: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        resolve_sampling(SamplingSettings(), {}, row)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("temperature", 101),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -3),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", 3),
    ],
)
def test_sampling_that_no_row_could_use_is_refused_before_any_row(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=field.replace("_", "-")):
        JobSettings.from_flat({"model": "m", field: value})


def test_one_stop_string_needs_no_list() -> None:
    assert SamplingSettings.model_validate({"stop": "ab"}).stop == ("ab",)
