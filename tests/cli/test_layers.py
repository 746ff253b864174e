"""Settings from a file may be spelled as the flags are."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.cli.layers import merge, merge_section, to_flat
from pipeline.errors import UsageError
from pipeline.settings import AuditSettings


def test_a_section_takes_names_with_dashes() -> None:
    assert merge_section(AuditSettings, {"audit-sample": "7"}).audit_sample == "7"


def test_storage_options_of_a_flag_join_those_of_the_file(tmp_path: Path) -> None:
    config = tmp_path / "job.yaml"
    config.write_text("model: m\nstorage-options:\n  region: eu-west-1\n  anonymous: true\n")
    said = {"storage_options": ["anonymous=false", "access_key_id=a", "secret_access_key=b"]}
    settings = merge(said, config)
    assert settings.store.storage_options == {
        "region": "eu-west-1",
        "anonymous": "false",
        "access_key_id": "a",
        "secret_access_key": "b",
    }
    assert to_flat(settings)["storage-options"] == {"region": "eu-west-1", "anonymous": "false"}
    with pytest.raises(UsageError, match="storage-options: write it as name=value") as error:
        merge({"storage_options": ["canary"]}, config)
    assert "canary" not in str(error.value)


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    config = tmp_path / "job.yaml"
    config.write_text("# model: m\n")
    assert merge({"model": "of the flag"}, config).model.model == "of the flag"
