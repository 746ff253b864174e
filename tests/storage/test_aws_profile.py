"""Profiles of AWS's own files: keys and region, and those whose keys are elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.inputs.prompt_source import open_source
from pipeline.location import Location
from pipeline.prompt_settings import ReadSettings
from pipeline.storage.aws_profile import read_profile
from tests.storage.buckets import KEY_ID, SECRET, Store
from tests.storage.test_object_store import PROMPTS, parquet


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    (tmp_path / "credentials").write_text(
        "[default]\naws_access_key_id = a\naws_secret_access_key = b%c\n"
        f"[work]\naws_access_key_id={KEY_ID}\naws_secret_access_key={SECRET}\n"
        "aws_session_token = t\n"
    )
    (tmp_path / "config").write_text(
        "[default]\nregion = eu-west-1\n[profile work]\nregion = us-east-1\noutput = json\n"
        "[profile sso]\nsso_session = mine\nregion = eu-west-1\n"
    )
    return tmp_path


def test_the_default_and_a_named_one(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_profile() == {
        "access_key_id": "a", "secret_access_key": "b%c", "region": "eu-west-1",
    }  # fmt: skip
    monkeypatch.setenv("AWS_PROFILE", "work")
    assert read_profile() == {
        "access_key_id": KEY_ID, "secret_access_key": SECRET, "session_token": "t",
        "region": "us-east-1",
    }  # fmt: skip


def test_without_files_nothing_is_said(files: Path) -> None:
    for name in ("credentials", "config"):
        (files / name).unlink()
    assert read_profile() == {}


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        ("nobody", "AWS_PROFILE names 'nobody', which AWS's files do not know; check it"),
        ("sso", "the AWS profile 'sso' has no keys of its own; put .* export-credentials"),
    ],
)
def test_a_profile_without_keys_is_one_sentence(
    files: Path, monkeypatch: pytest.MonkeyPatch, profile: str, says: str
) -> None:
    monkeypatch.setenv("AWS_PROFILE", profile)
    with pytest.raises(ValueError, match=says):
        read_profile()
    with pytest.raises(InputError, match=says):
        open_source(Location("s3://bucket/in.parquet"), ReadSettings())


def test_a_file_that_is_none_is_named(files: Path) -> None:
    (files / "config").write_text("no section")
    with pytest.raises(ValueError, match="config is no file of AWS profiles; mend it"):
        read_profile()


def test_prompts_are_read_with_a_profile(
    store: Store, bucket: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(bucket, "in.parquet", parquet(PROMPTS))
    monkeypatch.setenv("AWS_PROFILE", "work")
    location = Location(f"s3://{bucket}/in.parquet")
    assert open_source(location, ReadSettings()).num_rows == len(PROMPTS)
